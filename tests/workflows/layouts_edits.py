"""Where the nodes of the workflows with references, regions and sets stand."""

from __future__ import annotations

from canvas import Box, Layout

LOADERS = {"1": Box(0, 0, 330, 82), "2": Box(0, 230, 330, 82), "3": Box(0, 460, 330, 82)}
MODEL = {"Model": Box(-20, -80, 370, 740)}
WEIGHTS = """\
The loaders hold the small model that is part of Seedling: shapes and colours at 128 x 128 pixels. \
Choose real files there for real pictures; *Text to Image* says which.
"""
BELOW_LOADERS = {WEIGHTS: Box(-20, 730, 370, 150)}

A, B, C, D, E = 400, 830, 1260, 1630, 2080  # columns
# The row that paints a picture to work on.
PAINTED = {
    "4": Box(A, 0, 380, 310),
    "5": Box(B, 0, 380, 200),
    "6": Box(C, 0, 320, 290),
    "7": Box(D, 0, 320, 46),
    "8": Box(D, 90, 320, 230),
}
ROW = Box(A - 20, -80, 1590, 420)
SECOND = 480  # y of the second row


def own_picture(what: str) -> str:
    return (
        f"The upper row paints {what} to work on. For your own wire *Load Image* in its place and "
        "delete the row.\n\n"
    )


CHARACTER_SHEET = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        "9": Box(A, SECOND, 380, 240),
        "10": Box(B, SECOND, 400, 900),
        "12": Box(C, SECOND, 440, 520),
    },
    groups=MODEL | {
        "1 · The character": ROW,
        "2 · Who it is": Box(A - 20, SECOND - 80, 420, 720),
        "3 · One line a picture": Box(B - 20, SECOND - 80, 440, 1000),
        "4 · The sheet": Box(C - 10, SECOND - 80, 460, 640),
    },
    notes={
        own_picture("a character") +
        "Every picture of the set sees the same reference, which is read once. Give it a name in "
        "*References* and write `@name` in the prompts.\n": Box(A - 20, SECOND + 690, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the character"},
    control={"6": "fixed", "10": "fixed"},
)  # fmt: skip

STORYBOARD = Layout(
    nodes={
        **LOADERS,
        "4": Box(A, 0, 380, 400),
        "5": Box(B, 0, 400, 900),
        "7": Box(C, 0, 440, 520),
    },
    groups=MODEL | {
        "Size": Box(A - 20, -80, 420, 500),
        "Panels": Box(B - 20, -80, 440, 1000),
        "The board": Box(C - 10, -80, 460, 640),
    },
    notes={
        "A numbered list: a panel for each number. Each panel sees those before it, so figures "
        "stay who they are; panels and references together are at most 15.\n\nEach is shown and "
        "saved as soon as it is done. Stop whenever you like: the next run goes on from there.\n":
        Box(A - 20, 490, 420, 230),
        **BELOW_LOADERS,
    },
    control={"5": "fixed"},
)  # fmt: skip

REGION = {
    "9": Box(A, SECOND, 380, 470),
    "10": Box(B, SECOND, 380, 200),
    "11": Box(C, SECOND, 320, 290),
    "12": Box(D, SECOND, 320, 46),
    "13": Box(D, SECOND + 130, 320, 110),
    "14": Box(E, SECOND, 400, 470),
}
REGION_GROUPS = {
    "1 · The picture": ROW,
    "2 · Where": Box(A - 20, SECOND - 80, 420, 580),
    "3 · What": Box(B - 20, SECOND - 80, 410, 580),
    "4 · Paint, and back to the exact size": Box(C - 20, SECOND - 80, 1240, 580),
}

PRODUCT = Layout(
    nodes={**LOADERS, **PAINTED, **REGION},
    groups=MODEL | REGION_GROUPS,
    notes={
        own_picture("a product") +
        "The point in the corner takes the background, up to the product's edge: that is what may "
        "change. The product keeps its own pixels.\n": Box(A - 20, SECOND + 530, 420, 190),
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
        "15": Box(B, SECOND + 640, 380, 110),
        "16": Box(C, SECOND + 640, 320, 330),
    },
    groups=MODEL | REGION_GROUPS | {
        "5 · What stayed": Box(B - 20, SECOND + 560, 790, 440),
    },
    notes={
        own_picture("a picture") +
        "Say where: a box, a point, or the mask editor of *Load Image*. Outside of it not a bit "
        "changes, which the report below shows.\n": Box(A - 20, SECOND + 530, 420, 190),
        **BELOW_LOADERS,
    },
    titles={"5": "Encode Instruction: the picture", "10": "Encode Instruction: the fix"},
    control={"6": "fixed"},
)  # fmt: skip

RESTYLE = Layout(
    nodes={
        **LOADERS,
        **PAINTED,
        "9": Box(B, SECOND, 380, 200),
        "10": Box(C, SECOND, 320, 290),
        "11": Box(D, SECOND, 320, 46),
        "12": Box(D, SECOND + 90, 320, 230),
        "13": Box(A, 2 * SECOND, 380, 240),
        "14": Box(B, 2 * SECOND, 380, 200),
        "15": Box(C, 2 * SECOND, 320, 290),
        "16": Box(D, 2 * SECOND, 400, 46),
        "17": Box(D, 2 * SECOND + 90, 400, 380),
    },
    groups=MODEL | {
        "1 · What": ROW,
        "2 · The style": Box(B - 20, SECOND - 80, 1160, 430),
        "3 · One in the look of the other": Box(A - 20, 2 * SECOND - 80, 1670, 580),
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
        "9": Box(A, SECOND, 380, 150),
        "10": Box(B, SECOND + 300, 380, 146),
        "11": Box(B, SECOND, 380, 200),
        "12": Box(A, SECOND + 210, 380, 260),
        "13": Box(C, SECOND, 320, 290),
        "14": Box(D, SECOND, 320, 46),
        "15": Box(D, SECOND + 90, 320, 380),
    },
    groups=MODEL | {
        "1 · A sketch": ROW,
        "2 · Its lines": Box(A - 20, SECOND - 80, 420, 580),
        "3 · What it becomes": Box(B - 20, SECOND - 80, 410, 580),
        "4 · Paint": Box(C - 20, SECOND - 80, 730, 580),
    },
    notes={
        own_picture("something to draw after") +
        "*Control Signal* keeps its lines and hands them on as a reference. A drawing of your own "
        "can go to *References* as it is.\n": Box(A - 20, SECOND + 530, 420, 190),
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
