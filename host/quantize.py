"""`seedling quantize`: a smaller file of a diffusion model, made for your prompts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sampling.pipeline import Task
    from ..sampling.quantizing import Made
    from .models import Choice


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The options of `seedling quantize`, without those for weights."""
    add = made.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="a new .safetensors file; its "
        "plan and a comparison go beside it")  # fmt: skip
    add("--bits", type=float, metavar="N", help="for each weight on average; default: 8")
    add("--loss", type=float, metavar="PERCENT", help="the smallest file within this error of what "
        "the model predicts at each step, instead of --bits; 2 is hard to see")  # fmt: skip
    add("--plan", type=Path, metavar="FILE", help="follow the plan of another run instead")
    add("--prompts", required=True, type=Path, metavar="FILE", help="a prompt in each line, and "
        "after tabs the pictures it refers to; 8 to 32 that are like yours")  # fmt: skip
    add("--trials", type=Path, metavar="FOLDER", help="where what was tried is kept, for another "
        "budget; default: beside the new file")  # fmt: skip
    add("--six", action="store_true", help="also layers of 6 bits, which ComfyUI reads with a "
        "comfy-kitchen of 0.2.40 or later only")  # fmt: skip
    add("--inputs", type=int, choices=(16, 8, 4), default=8, help="bits that inputs of quantized "
        "layers may be rounded to: 8 (default) is fast, 16 loses least and is slower, 4 is for "
        "cards that multiply 4 bits by 4 bits")  # fmt: skip
    add("--steps", type=int, metavar="N", help="default: as the model likes it")
    add("--seed", type=int, default=0, metavar="N")
    add("--memory", type=float, default=2, metavar="GB", help="for what is observed; default: 2")


def run(given: argparse.Namespace, choice: Choice, say: Callable[[str], None]) -> int:
    """Carry out the command. Raises the engine's errors."""
    from tqdm import tqdm

    from ..sampling.quantizing import Wish, check_out, quantize
    from .generate import BAR, OrderError, device_of, load
    from .models import choose

    if sum(way is not None for way in (given.bits, given.loss, given.plan)) > 1:
        raise OrderError("give one of --bits, --loss and --plan.")
    memory = int(given.memory * (1 << 30)) if math.isfinite(given.memory) else 0
    wish = Wish(given.bits, given.loss, given.plan, given.trials, memory, given.six, given.inputs)
    wish.check()
    check_out(given.out)
    tasks = tasks_of(given.prompts, given.steps, given.seed)
    pipeline = load(choose(choice), device_of(given.device), say, dtype=choice.dtype)
    bar = tqdm(desc="layers", bar_format=BAR, disable=None, delay=0.1)  # seen once layers are done

    def progress(done: int, of: int) -> None:
        bar.total = of
        bar.update(done - bar.n)

    with bar:
        made = quantize(pipeline, tasks, given.out, wish, progress)
    say(made.words())
    say(f"{compared(made, tasks)}  (full precision on the left)")
    return 0


def tasks_of(file: Path, steps: int | None, seed: int) -> list[Task]:
    """A task for each line of a file: a prompt, and after tabs pictures, as seen from the file."""
    from ..sampling.pipeline import Task
    from .generate import OrderError
    from .pictures import read_picture

    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise OrderError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OrderError(f"{file} is not UTF-8 text; save it as UTF-8.") from error
    tasks: list[Task] = []
    for line in lines:
        prompt, *names = (word.strip() for word in line.split("\t"))
        if not prompt or prompt.startswith("#"):
            continue
        shown = tuple(read_picture(file.parent / name).pixels for name in names if name)
        tasks.append(Task(prompt, shown, steps=steps, seed=seed + len(tasks)))
    if not tasks:
        raise OrderError(f"{file} holds no prompt; write one in each line.")
    return tasks


def compared(made: Made, tasks: Sequence[Task]) -> Path:
    """A PNG beside the new file: pictures of both models side by side."""
    from .pictures import png, to_image, write_at
    from .sheet import Tile, contact_sheet

    tiles = [
        Tile((to_image(before), to_image(after)), task.prompt, made.out.name)
        for task, before, after in zip(tasks, made.before, made.after, strict=False)
    ]
    path = made.out.with_suffix(".png")
    write_at(path, png(contact_sheet(tiles)), replace=True)
    return path
