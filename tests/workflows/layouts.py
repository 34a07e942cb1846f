"""Where the nodes of the example workflows and blueprints stand, and what stands beside them."""

from __future__ import annotations

from canvas import Blueprint, Box, Layout, Port
from layouts_edits import EDITS

LOADERS = {"1": Box(0, 0, 330, 174), "2": Box(0, 230, 330, 174), "3": Box(0, 460, 330, 174)}
MODEL = {"Model": Box(-20, -80, 370, 740)}
WEIGHTS = """\
**seedling-tiny** is a demonstration: 128 x 128 pixels, a few shapes and colours.

For real pictures get the files of Qwen-Image-2.1 (Comfy-Org/Qwen-Image-2.1 on Hugging Face) and \
choose them in the three loaders:

- `models/diffusion_models/qwen_image_2.1_bf16.safetensors`
- `models/text_encoders/qwen3vl_8b_bf16.safetensors`, with `tokenizer.json` of Qwen3-VL beside it
- `models/vae/qwen_image_2.1_vae_bf16.safetensors`
"""
BELOW_LOADERS = Box(-20, 730, 370, 260)

TEXT_TO_IMAGE = Layout(
    nodes={
        **LOADERS,
        "4": Box(420, 330, 400, 510),
        "5": Box(420, 0, 400, 278),
        "6": Box(900, 0, 330, 558),
        "7": Box(900, 640, 330, 54),
        "9": Box(1310, 0, 440, 520),
    },
    groups=MODEL | {
        "What to paint": Box(400, -80, 440, 950),
        "Paint": Box(880, -80, 370, 830),
        "Picture": Box(1290, -80, 480, 740),
    },
    notes={
        "Write what you want to see into the green node and press **Run**.\n\n"
        "- The seed changes after every run. Set *control after generate* to *fixed* to keep it.\n"
        "- *shape* takes `16:9`, `poster` or `1216x832`.\n": Box(400, 930, 440, 170),
        WEIGHTS: BELOW_LOADERS,
    },
)  # fmt: skip

MANY_SEEDS = Layout(
    nodes=TEXT_TO_IMAGE.nodes,
    groups=TEXT_TO_IMAGE.groups,
    notes={
        "*batch size* says how many pictures are painted in one go. Each has its own seed: the one "
        "of the sampler, the next, and so on.\n\nThe prompt is read once for all of them.\n":
            Box(400, 930, 440, 170),
        WEIGHTS: BELOW_LOADERS,
    },
    titles={"4": "Canvas Size: four pictures"},
)  # fmt: skip

A, B, C, D = 400, 830, 1260, 1630  # columns of the larger workflows
SECOND = 710  # y of their second row

EDIT = Layout(
    nodes={
        **LOADERS,
        "4": Box(A, 0, 380, 502),
        "5": Box(B, 0, 380, 278),
        "6": Box(C, 0, 320, 558),
        "7": Box(D, 0, 320, 54),
        "14": Box(D, 110, 320, 300),
        "8": Box(A, SECOND, 380, 344),
        "10": Box(B, SECOND, 380, 278),
        "9": Box(B, SECOND + 330, 380, 502),
        "11": Box(C, SECOND, 320, 558),
        "12": Box(D, SECOND, 400, 54),
        "13": Box(D, SECOND + 110, 400, 460),
    },
    groups=MODEL | {
        "1 · A picture to edit": Box(A - 20, -80, 1590, 670),
        "2 · What to change": Box(A - 20, SECOND - 80, 850, 935),
        "3 · Paint the edit": Box(C - 20, SECOND - 80, 810, 670),
    },
    notes={
        "The upper row paints a picture to edit. For one of your own wire *Load Image* to image_1 "
        "of *References*, or drop a file on that node, and delete the row.\n\n"
        "The lower *Canvas Size* takes the size of the first reference, so that nothing shifts.\n":
            Box(A - 20, SECOND + 910, 850, 120),
        WEIGHTS: BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the picture", "10": "Encode Instruction: the edit"},
    control={"6": "fixed"},
)  # fmt: skip

COMPOSE = Layout(
    nodes={
        **LOADERS,
        "4": Box(A, 0, 380, 502),
        "5": Box(B, 0, 380, 278),
        "6": Box(C, 0, 320, 558),
        "7": Box(D, 0, 320, 54),
        "16": Box(D, 110, 320, 300),
        "8": Box(B, SECOND, 380, 278),
        "9": Box(C, SECOND, 320, 558),
        "10": Box(D, SECOND, 320, 54),
        "17": Box(D, SECOND + 110, 320, 300),
        "11": Box(A, 2 * SECOND, 380, 364),
        "12": Box(B, 2 * SECOND, 380, 278),
        "13": Box(C, 2 * SECOND, 320, 558),
        "14": Box(D, 2 * SECOND, 400, 54),
        "15": Box(D, 2 * SECOND + 110, 400, 440),
    },
    groups=MODEL | {
        "Size": Box(A - 20, -80, 420, 620),
        "Image 1": Box(B - 20, -80, 1160, 670),
        "Image 2": Box(B - 20, SECOND - 80, 1160, 670),
        "Both in one picture": Box(A - 20, 2 * SECOND - 80, 1670, 670),
    },
    notes={
        "Two pictures are painted first. For your own wire *Load Image* to image_1, image_2, … of "
        "*References*, which grows up to 14, or drop files on it, and delete the upper two rows."
        "\n\nThe instruction calls them `image 1`, `image 2`, …\n": Box(A - 20, 610, 420, 200),
        WEIGHTS: BELOW_LOADERS,
    },
    titles={
        "5": "Encode Instruction: image 1",
        "8": "Encode Instruction: image 2",
        "12": "Encode Instruction: the composition",
    },
    control={"6": "fixed", "9": "fixed"},
)  # fmt: skip

IMAGE_SET = Layout(
    nodes={
        **LOADERS,
        "4": Box(420, 0, 400, 502),
        "5": Box(900, 0, 440, 860),
        "6": Box(1400, 0, 440, 520),
    },
    groups=MODEL | {
        "Size": Box(400, -80, 440, 610),
        "One prompt a line": Box(880, -80, 480, 960),
        "All of them": Box(1380, -80, 480, 640),
    },
    notes={
        "One picture for each line, saved as soon as it is done. Stop whenever you like: the next "
        "run goes on from there.\n\nWire *References* to give all of them the same figure.\n\n"
        "*each sees* › *the pictures before it* lets every picture see the finished ones: figures "
        "stay alike, and it takes longer.\n": Box(400, 600, 440, 280),
        WEIGHTS: BELOW_LOADERS,
    },
)  # fmt: skip

# title: (API graph, layout). The title is the file's name, which the editor shows.
WORKFLOWS = {
    "Text to Image": ("text_to_image", TEXT_TO_IMAGE),
    "Edit a Picture": ("edit_a_picture", EDIT),
    "Compose from References": ("compose_from_references", COMPOSE),
    "Image Set": ("image_set", IMAGE_SET),
    "Same Prompt, Many Seeds": ("same_prompt_many_seeds", MANY_SEEDS),
    **EDITS,
}


# ---- blueprints --------------------------------------------------------------------------------


def models(*more: Port) -> tuple[Port, ...]:
    """The inputs that every blueprint ends with."""
    files = (("dit", "1", "diffusion model"), ("encoder", "2", "text encoder"), ("vae", "3", "VAE"))
    return *more, *(Port(name, ((node, name),), label) for name, node, label in files)


T2I_PLACES = {key: TEXT_TO_IMAGE.nodes[key] for key in ("1", "2", "3", "4", "5", "6", "7")}
EDIT_PLACES = {
    **LOADERS,
    "8": Box(420, 0, 400, 344),
    "9": Box(420, 400, 400, 502),
    "10": Box(900, 0, 400, 278),
    "11": Box(1380, 0, 330, 558),
    "12": Box(1380, 620, 330, 54),
}
COMPOSE_PLACES = {
    **LOADERS,
    "11": Box(420, 0, 400, 404),
    "4": Box(420, 460, 400, 502),
    "12": Box(900, 0, 400, 278),
    "13": Box(1380, 0, 330, 558),
    "14": Box(1380, 620, 330, 54),
}
BLUEPRINTS = {
    "text_to_image": Blueprint(
        "Text to Image (Seedling)",
        "Paints a picture from a text in few steps.",
        ("text to image", "generate", "Qwen-Image", "文生图"),
        models(
            Port("prompt", (("5", "prompt"),)),
            Port("shape", (("4", "shape"),)),
            Port("seed", (("6", "seed"),)),
        ),
        ("image", "7", 0),
        Layout(T2I_PLACES),
    ),
    "edit_a_picture": Blueprint(
        "Edit a Picture (Seedling)",
        "Changes a picture as the instruction says; what it does not name stays where it is.",
        ("image edit", "instruction", "Qwen-Image", "图像编辑"),
        models(
            Port("image", (("8", "images.image_1"),)),
            Port("prompt", (("10", "prompt"),)),
            Port("seed", (("11", "seed"),)),
        ),
        ("image", "12", 0),
        Layout(EDIT_PLACES),
    ),
    "compose_from_references": Blueprint(
        "Compose from References (Seedling)",
        "Puts up to four pictures together as the instruction says: image 1, image 2, …",
        ("multi reference", "compose", "Qwen-Image", "多图融合"),
        models(
            *(Port(f"image_{n}", (("11", f"images.image_{n}"),)) for n in range(1, 5)),
            Port("prompt", (("12", "prompt"),)),
            Port("shape", (("4", "shape"),)),
            Port("seed", (("13", "seed"),)),
        ),
        ("image", "14", 0),
        Layout(COMPOSE_PLACES),
    ),
}
