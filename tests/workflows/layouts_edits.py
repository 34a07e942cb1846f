"""Where the nodes of the workflows with references, regions and sets stand."""

from __future__ import annotations

from canvas import Box, Layout

LOADERS = {"1": Box(0, 0, 330, 174), "2": Box(0, 230, 330, 174), "3": Box(0, 460, 330, 174)}
MODEL = {"Model": Box(-20, -80, 370, 740)}
WEIGHTS = """\
The loaders hold the small model that is part of Seedling: shapes and colours at 128 x 128 pixels. \
Choose real files there for real pictures; *Text to Image* says which.
"""
BELOW_LOADERS = {WEIGHTS: Box(-20, 730, 370, 150)}

A, B, C, D, E = 400, 830, 1260, 1630, 2080  # columns
# The row that paints a picture to work on.
PAINTED = {
    "4": Box(A, 0, 380, 502),
    "5": Box(B, 0, 380, 278),
    "6": Box(C, 0, 320, 558),
    "7": Box(D, 0, 320, 54),
    "8": Box(D, 110, 320, 300),
}
HIGH = 670  # of a row's groups
ROW = Box(A - 20, -80, 1590, HIGH)
SECOND = 710  # y of the second row


def own_picture(what: str) -> str:
    return (
        f"The upper row paints {what} to work on. For your own wire *Load Image* in its place and "
        "delete the row.\n\n"
    )


CHARACTER_SHEET = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        "9": Box(A, SECOND, 380, 344),
        "10": Box(B, SECOND, 400, 900),
        "12": Box(C + 40, SECOND, 440, 520),
    },
    groups=MODEL | {
        "1 · The character": ROW,
        "2 · Who it is": Box(A - 20, SECOND - 80, 420, HIGH),
        "3 · One line a picture": Box(B - 20, SECOND - 80, 440, 1000),
        "4 · The sheet": Box(C + 20, SECOND - 80, 480, 640),
    },
    notes={
        own_picture("a character") +
        "Every picture of the set sees the same reference, which is read once. Give it a name in "
        "*References* and write `@name` in the prompts.\n": Box(A - 20, SECOND + 640, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the character"},
    control={"6": "fixed", "10": "fixed"},
)  # fmt: skip

STORYBOARD = Layout(
    nodes={
        **LOADERS,
        "4": Box(A, 0, 380, 502),
        "5": Box(B, 0, 400, 900),
        "7": Box(C + 40, 0, 440, 520),
    },
    groups=MODEL | {
        "Size": Box(A - 20, -80, 420, 610),
        "Panels": Box(B - 20, -80, 440, 1000),
        "The board": Box(C + 20, -80, 480, 640),
    },
    notes={
        "A numbered list: a panel for each number. Each panel sees those before it, so figures "
        "stay who they are; panels and references together are at most 15.\n\nEach is shown and "
        "saved as soon as it is done. Stop whenever you like: the next run goes on from there.\n":
        Box(A - 20, 600, 420, 230),
        **BELOW_LOADERS,
    },
    control={"5": "fixed"},
)  # fmt: skip

REGION = {
    "9": Box(A, SECOND, 380, 470),
    "10": Box(B, SECOND, 380, 278),
    "11": Box(C, SECOND, 320, 558),
    "12": Box(D, SECOND, 320, 54),
    "13": Box(D, SECOND + 130, 320, 110),
    "14": Box(E, SECOND, 400, 470),
}
REGION_GROUPS = {
    "1 · The picture": ROW,
    "2 · Where": Box(A - 20, SECOND - 80, 420, HIGH),
    "3 · What": Box(B - 20, SECOND - 80, 410, HIGH),
    "4 · Paint, and back to the exact size": Box(C - 20, SECOND - 80, 1240, HIGH),
}

PRODUCT = Layout(
    nodes={**LOADERS, **PAINTED, **REGION},
    groups=MODEL | REGION_GROUPS,
    notes={
        own_picture("a product") +
        "The point in the corner takes the background, up to the product's edge: that is what may "
        "change. The product keeps its own pixels.\n": Box(A - 20, SECOND + 640, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the product", "10": "Encode Instruction: the background"},
    control={"6": "fixed"},
)  # fmt: skip

FIX = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        **REGION,
        "15": Box(B, SECOND + 720, 380, 190),
        "16": Box(C, SECOND + 720, 320, 330),
    },
    groups=MODEL | REGION_GROUPS | {
        "5 · What stayed": Box(B - 20, SECOND + 640, 790, 440),
    },
    notes={
        own_picture("a picture") +
        "Say where: a box, a point, or the mask editor of *Load Image*. Outside of it not a bit "
        "changes, which the report below shows.\n": Box(A - 20, SECOND + 640, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the picture", "10": "Encode Instruction: the fix"},
    control={"6": "fixed"},
)  # fmt: skip

RESTYLE = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        "9": Box(B, SECOND, 380, 278),
        "10": Box(C, SECOND, 320, 558),
        "11": Box(D, SECOND, 320, 54),
        "12": Box(D, SECOND + 110, 320, 300),
        "13": Box(A, 2 * SECOND, 380, 364),
        "14": Box(B, 2 * SECOND, 380, 278),
        "15": Box(C, 2 * SECOND, 320, 558),
        "16": Box(D, 2 * SECOND, 400, 54),
        "17": Box(D, 2 * SECOND + 110, 400, 440),
    },
    groups=MODEL | {
        "1 · What": ROW,
        "2 · The style": Box(B - 20, SECOND - 80, 1160, HIGH),
        "3 · One in the look of the other": Box(A - 20, 2 * SECOND - 80, 1670, HIGH),
    },
    notes={
        "Two pictures are painted first. For your own wire *Load Image* to image_1 and image_2 of "
        "*References*, and delete the upper two rows.\n\nThe instruction calls them `image 1` and "
        "`image 2`; a *role* in the list of *References* says what each is for.\n":
            Box(A - 20, SECOND - 80, 420, 220),
        **BELOW_LOADERS,
    },
    titles={
        "5": "Encode Instruction: image 1",
        "9": "Encode Instruction: image 2",
        "14": "Encode Instruction: the restyling",
    },
    control={"6": "fixed", "10": "fixed"},
)  # fmt: skip

SKETCH = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        "9": Box(A, SECOND, 380, 218),
        "10": Box(B, SECOND + 330, 380, 502),
        "11": Box(B, SECOND, 380, 278),
        "12": Box(A, SECOND + 280, 380, 290),
        "13": Box(C, SECOND, 320, 558),
        "14": Box(D, SECOND, 320, 54),
        "15": Box(D, SECOND + 110, 320, 440),
    },
    groups=MODEL | {
        "1 · A sketch": ROW,
        "2 · Its lines": Box(A - 20, SECOND - 80, 420, HIGH),
        "3 · What it becomes": Box(B - 20, SECOND - 80, 410, 935),
        "4 · Paint": Box(C - 20, SECOND - 80, 730, HIGH),
    },
    notes={
        own_picture("something to draw after") +
        "*Control Signal* keeps its lines and hands them on as a reference. A drawing of your own "
        "can go to *References* as it is.\n": Box(A - 20, SECOND + 640, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the sketch", "11": "Encode Instruction: the picture"},
    control={"6": "fixed"},
)  # fmt: skip

# title: (API graph, layout)
EDITS = {
    "Character Sheet": ("character_sheet", CHARACTER_SHEET),
    "Storyboard": ("storyboard", STORYBOARD),
    "Product on a New Background": ("product_on_a_new_background", PRODUCT),
    "Restyle by Reference": ("restyle_by_reference", RESTYLE),
    "Fix a Region": ("fix_a_region", FIX),
    "Sketch to Picture": ("sketch_to_picture", SKETCH),
}
