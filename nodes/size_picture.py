"""The shape of a canvas, drawn: what Canvas Size shows on itself."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, HEIGHT, MARGIN = 448, 320, 16  # of the drawing, in pixels
GROUND, SHEET, EDGE, MORE, INK = "#1d1f24", "#dfe3ea", "#8b94a5", "#343946", "#1d1f24"


def size_picture(width: int, height: int, padded: tuple[int, int], words: str) -> Tensor:
    """A drawing (H, W, 3) in 0..1 of a sheet of width x height pixels.

    What is painted beyond it (`padded`: width and height) is darker. `words` are parts with " · "
    between them: the first one large on the sheet, the others below the drawing.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(22), ImageFont.load_default(16)
    title, *more = words.split(" · ")
    room = (WIDTH - 2 * MARGIN, HEIGHT - 3 * MARGIN - 20)
    scale = min(room[0] / padded[0], room[1] / padded[1])
    whole = tuple(max(2, round(side * scale)) for side in padded)
    sheet = tuple(max(2, round(side * scale)) for side in (width, height))
    left, top = MARGIN + (room[0] - whole[0]) // 2, MARGIN + (room[1] - whole[1]) // 2
    if whole != sheet:
        draw.rectangle((left, top, left + whole[0], top + whole[1]), fill=MORE)
    draw.rectangle((left, top, left + sheet[0], top + sheet[1]), fill=SHEET, outline=EDGE)
    middle = (left + sheet[0] / 2, top + sheet[1] / 2)
    size = draw.textlength(title, large)
    if size + 8 < sheet[0] and sheet[1] > 36:
        draw.text(middle, title, INK, large, anchor="mm")
    else:  # a strip, too thin for words
        more = [title, *more]
    draw.text((WIDTH / 2, HEIGHT - MARGIN), " · ".join(more), SHEET, small, anchor="ms")
    return torch.from_numpy(np.array(image)).float() / 255
