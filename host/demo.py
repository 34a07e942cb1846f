"""`seedling demo`: one picture of each kind, and a contact sheet of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..sampling.pipeline import Pipeline, Task
from .generate import OrderError, Say, Writer, device_of, load, pictures, progress_bar
from .models import ASSETS, Choice, choose
from .pictures import PictureFile, png, read_picture, to_image, write_at
from .sheet import Tile, contact_sheet, thumbnail
from .studio import DEFAULT_PORT

SCENES = ASSETS / "demo"
GREEN_ABOVE_YELLOW = "一个绿色的爱心在一个黄色的方形的上面"
ADD = "add a big red star at the top left"


@dataclass(frozen=True)
class Piece:
    """A picture of the demo. `note` says in English what another language says."""

    name: str
    prompt: str
    references: tuple[str, ...] = ()  # file names in the demo's folder
    note: str = ""


@dataclass(frozen=True)
class Show:
    """What the user may change about the demo."""

    picture: Path | None = None
    instruction: str | None = None
    out: Path = Path("seedling-demo")
    seed: int = 0
    weights: Choice = Choice()
    device: str = "auto"


def pieces(show: Show) -> list[Piece]:
    own = "yours.png" if show.picture else "photo.png"
    return [
        Piece("text", "a red star left of a blue circle"),
        Piece(
            "chinese", GREEN_ABOVE_YELLOW, note="in Chinese: a green heart above a yellow square"
        ),
        Piece("edit", "make the blue heart yellow", ("scene.png",)),
        Piece("your-edit" if show.picture else "photo-edit", show.instruction or ADD, (own,)),
        Piece(
            "composition",
            "put the white circle from image 1 to the left of the red moon in image 2",
            ("image-1.png", "image-2.png"),
        ),
    ]


def demo(show: Show, saved: list[Path], say: Say) -> None:
    """Make all pieces in the folder `show.out`, over those of an earlier demo.

    What was edited lies beside what came of it. Each file is appended to `saved` when complete.
    """
    begin = time.perf_counter()
    own = read_picture(show.picture) if show.picture else None
    if show.out.exists() and not show.out.is_dir():
        raise OrderError(f"--out {show.out} is a file; name a folder.")
    pipeline = load(choose(show.weights), device_of(show.device), say, dtype=show.weights.dtype)
    inputs = bring(pipeline, show.out, own)
    say(f"Five pictures with {pipeline.dit.checkpoint.name}, a demonstration model, on "
        f"{pipeline.device}, then a sheet of all.")  # fmt: skip
    tiles = []
    steps = pipeline.plan(Task("")).sigmas
    with progress_bar(len(pieces(show)) * (len(steps) - 1)) as bar:
        for piece in pieces(show):
            files = [inputs[name] for name in piece.references]
            task = Task(piece.prompt, tuple(file.pixels for file in files), seed=show.seed)
            writer = Writer(pipeline, show.out, files)
            for made in pictures(pipeline, task, bar):
                image = to_image(made.picture.pixels)
                path = show.out / f"{piece.name}.png"
                data = writer.png(task, pipeline.plan(task), made.picture, image)
                write_at(path, data, replace=True)
                saved.append(path)
                say(f"{str(path):<36} {made.seconds:5.1f} s  {_words(piece)}")
                shown = [thumbnail(to_image(file.pixels)) for file in files]
                tiles.append(Tile((*shown, thumbnail(image)), piece.prompt, piece.note))
    saved.append(show.out / "sheet.png")
    write_at(saved[-1], png(contact_sheet(tiles)), replace=True)
    seconds = time.perf_counter() - begin
    say(f"{str(saved[-1]):<36} {seconds:5.1f} s  all of them (seconds in all)")
    say(f"make studio opens the editor with this model: http://127.0.0.1:{DEFAULT_PORT}/")


def bring(pipeline: Pipeline, folder: Path, own: PictureFile | None) -> dict[str, PictureFile]:
    """Copy the pictures to edit into `folder`, where recipes will find them; read them there."""
    names = ["scene.png", "image-1.png", "image-2.png", *([] if own else ["photo.png"])]
    for name in names:
        if not (SCENES / name).is_file():
            raise OrderError(f"assets/demo/{name} is missing; get the whole repository again.")
        write_at(folder / name, (SCENES / name).read_bytes(), replace=True)
    if own:
        names.append("yours.png")
        write_at(folder / "yours.png", png(to_image(square(pipeline, own))), replace=True)
    return {name: read_picture(folder / name) for name in names}


def square(pipeline: Pipeline, own: PictureFile):
    """The middle of a picture at the size that the model was made for: it knows squares only."""
    height, width = own.pixels.shape[:2]
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    middle = own.pixels[top : top + side, left : left + side]
    size, _ = pipeline.plan(Task("")).size
    return pipeline.family.resize(middle, (size, size))


def _words(piece: Piece) -> str:
    return f"{piece.prompt} ({piece.note})" if piece.note else piece.prompt
