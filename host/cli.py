"""The command `seedling`: what may be typed, and what becomes of errors.

Exit codes: 0 done, 1 a part of a batch failed, 2 refused (one sentence on stderr says why), 130
stopped with Ctrl-C. A bug is a traceback.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .batch import add_arguments as add_batch_arguments
from .quantize import add_arguments as add_quantize_arguments
from .studio import add_arguments as add_studio_arguments

PRECISIONS = ("stored", "auto", "fp32", "bf16", "fp16")
Command = Callable[[argparse.Namespace, list[Path]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Raises SystemExit for words that cannot be parsed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a prompt's letters
            stream.reconfigure(errors="backslashreplace")
    given = parser().parse_args(arguments)
    saved: list[Path] = []
    try:
        return given.command(given, saved)
    except KeyboardInterrupt:
        print(f"\nStopped. {_kept(saved)}", file=sys.stderr)
        return 130
    except ValueError as error:
        if not _is_ours(error):
            raise
        text = f"seedling: {error}"
        print(text if not saved else f"{text}\n{_kept(saved)}", file=sys.stderr)
        return 2


def _is_ours(error: ValueError) -> bool:
    """Whether this package raised it on purpose: a class of its own, of whatever family."""
    package = __name__.rpartition(".")[0].rpartition(".")[0]
    return type(error).__module__.startswith(f"{package}.")


def _kept(saved: list[Path]) -> str:
    if not saved:
        return "Nothing was saved."
    if len(saved) > 8:
        return f"Saved before: {len(saved)} pictures, {saved[0]} to {saved[-1]}"
    return f"Saved before: {', '.join(map(str, saved))}"


def _say(text: str) -> None:
    """Print above the progress bar, if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


# ---- commands: heavy imports inside, so that --help is quick -----------------------------------


def _generate(given: argparse.Namespace, saved: list[Path]) -> int:
    from .edits import Places
    from .generate import Order, generate
    from .recipe import read_recipe

    if given.recipe:
        if given.repeat is None:
            _misused(given, "--recipe shows the recipe of the picture named with --from")
        _say(read_recipe(given.repeat).text())
        return 0
    if given.earlier and not given.series:
        _misused(given, "--earlier goes with --set")
    if given.same_seed and not given.series:
        _misused(given, "--same-seed goes with --set")
    if given.series and given.repeat:
        _misused(given, "give --set or --from, not both")
    order = Order(
        prompts=_prompts(given),
        references=tuple(given.reference),
        repeat=given.repeat,
        weights=_weights(given),
        loras=tuple(given.lora),
        size=given.size,
        steps=given.steps,
        guidance=given.guidance,
        negative=given.negative,
        seed=given.seed,
        sampler=given.sampler,
        resolution=given.resolution,
        vlm_resolution=tuple(given.vlm_resolution),
        variant=given.variant,
        layers=given.layers,
        count=(0 if given.series else 1) if given.count is None else given.count,
        device=given.device,
        out=given.out,
        sheet=given.sheet,
        cache=given.cache,
        vram=given.vram,
        series=given.series,
        earlier=tuple(given.earlier),
        same_seed=given.same_seed,
        places=Places(
            boxes=tuple(given.region),
            points=tuple(given.point),
            mask=given.mask,
            grow=given.grow,
            feather=given.feather,
            context=given.context,
        ),
    )
    return 1 if generate(order, saved, _say) else 0


def _misused(given: argparse.Namespace, text: str) -> NoReturn:
    """Refuse options that do not go together, as argparse does."""
    given.parser.error(text)
    raise AssertionError


def _prompts(given: argparse.Namespace) -> tuple[str, ...]:
    """The prompt on the command line, or those in a file: one a line, # begins a comment."""
    from .generate import OrderError

    if given.prompts is None:
        return () if given.prompt is None else (given.prompt,)
    if given.prompt is not None:
        _misused(given, "give a prompt or --prompts FILE, not both")
    try:
        lines = given.prompts.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise OrderError(f"{given.prompts} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OrderError(f"{given.prompts} is not UTF-8 text; save it as UTF-8.") from error
    prompts = tuple(s for line in lines if (s := line.strip()) and not s.startswith("#"))
    if not prompts:
        raise OrderError(f"{given.prompts} holds no prompt; write one in each line.")
    return prompts


def _demo(given: argparse.Namespace, saved: list[Path]) -> int:
    from .demo import Show, demo

    show = Show(
        picture=given.picture,
        instruction=given.instruction,
        out=given.out,
        seed=given.seed,
        weights=_weights(given),
        device=given.device,
    )
    demo(show, saved, _say)
    return 0


def _inspect(given: argparse.Namespace, saved: list[Path]) -> int:
    from ..model_loaders.inspect import inspect

    report = inspect(given.file)
    print(report.json() if given.json else report.words())
    return report.exit_code


def _models(given: argparse.Namespace, saved: list[Path]) -> int:
    from .models import table

    print(table(given.comfyui))
    return 0


def _doctor(given: argparse.Namespace, saved: list[Path]) -> int:
    from .doctor import examine

    print(examine(given.comfyui))
    return 0


def _download(given: argparse.Namespace, saved: list[Path]) -> int:
    from .download import run

    return run(given, _say)


def _run(given: argparse.Namespace, saved: list[Path]) -> int:
    from .batch import run

    try:
        return run(given, saved, _say)
    except KeyboardInterrupt:
        print("\nThe same command goes on from here.", end="", file=sys.stderr)
        raise


def _studio(given: argparse.Namespace, saved: list[Path]) -> int:
    from .studio import run

    return run(given)


def _quantize(given: argparse.Namespace, saved: list[Path]) -> int:
    from .quantize import run

    try:
        return run(given, _weights(given), _say)
    except KeyboardInterrupt:
        print("\nWhat was tried is kept; the same command goes on.", end="", file=sys.stderr)
        raise


def _weights(given: argparse.Namespace):
    from .models import Choice

    return Choice(given.dit, given.vae, given.encoder, given.comfyui, given.precision)


# ---- what may be typed -------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="seedling", description="Pictures from words, and pictures edited by words."
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_demo(commands)
    batch = _command(commands, "run", _run, "run a workflow with many values, on any ComfyUI")
    add_batch_arguments(batch)
    inspect = _command(commands, "inspect", _inspect, "say what a model file is")
    inspect.add_argument("file", type=Path, metavar="FILE", help=".safetensors file, or a folder")
    inspect.add_argument("--json", action="store_true", help="as one JSON object")
    studio = _command(commands, "studio", _studio, "serve the editor to your browser")
    add_studio_arguments(studio)
    models = _command(commands, "models", _models, "list the model files that are found")
    _add_comfyui(models)
    _add_comfyui(_command(commands, "doctor", _doctor, "say what works here and what is missing"))
    _add_download(commands)
    quantize = _command(commands, "quantize", _quantize, "make a smaller file of a model")
    add_quantize_arguments(quantize)
    _add_weights(quantize.add_argument)
    return top


def _command(
    commands: argparse._SubParsersAction, name: str, run: Command, words: str
) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
    made.set_defaults(command=run, parser=made)
    return made


def _add_generate(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands, "generate", _generate, "make pictures from words and reference pictures"
    ).add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to make, or what to change")
    add("--reference", action="append", default=[], type=Path, metavar="FILE",
        help='a picture to edit or to use; repeated: "image 1", "image 2", ...')  # fmt: skip
    add("--region", action="append", default=[], metavar="X,Y,W,H", help="edit the first reference "
        "in this box only, in pixels or %%; the rest keeps its bits; repeated")  # fmt: skip
    add("--point", action="append", default=[], metavar="X,Y", help="the same for what is joined "
        "to this point in about its colour; repeated")  # fmt: skip
    add("--mask", type=Path, metavar="FILE", help="the same for what is white in this picture")
    add("--grow", type=int, metavar="N", help="make the region so many pixels larger, or smaller; "
        "default: 0")  # fmt: skip
    add("--feather", type=int, metavar="N", help="pixels over which the new picture fades in, "
        "inside the region's edge; default: 4")  # fmt: skip
    add("--context", type=int, metavar="N", help="the model sees so many pixels around the region; "
        "default: 0, the whole picture")  # fmt: skip
    add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
        help="a LoRA: its path, or its name in the loras folder; repeated")  # fmt: skip
    add("--size", metavar="SIZE", help="1024x768, 16:9, 16:9@2K, poster; default: the first "
        "reference's, else the model's own")  # fmt: skip
    add("--count", type=int, metavar="N", help="pictures, with seeds counting up; default: 1, of a "
        "set as many as its prompts say")  # fmt: skip
    add("--seed", type=int, metavar="N", help="default: a fresh one, which is shown and saved")
    add("--steps", type=int, metavar="N", help="default: as the model likes it")
    add("--guidance", type=float, metavar="X", help="default: as the model likes it; 1 is off")
    add("--negative", metavar="TEXT", help="what to steer away from, where guidance is not 1")
    add("--sampler", metavar="NAME", help="euler (default) or dpmpp_2m")
    add("--resolution", type=int, metavar="N", help="side of the square whose area references "
        "are brought to; 0 keeps each as large as it is")  # fmt: skip
    add("--vlm-resolution", action="append", default=[], type=int, metavar="N", help="the same for "
        "what the text encoder sees of references: for all, or repeated for one after the other; 0 "
        "is its usual size")  # fmt: skip
    add("--variant", metavar="NAME", help="which model of its family --dit is, where the file does "
        "not say; a wrong name lists them")  # fmt: skip
    add("--layers", type=int, metavar="N", help="into how many a model that paints in layers takes "
        "the picture apart; default: 4")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="a prompt in each line, # for comments")
    add("--out", type=Path, default=Path(), metavar="PATH",
        help="folder, or a new PNG file; default: here, seedling_00001.png and up")  # fmt: skip
    add("--set", dest="series", choices=("independent", "sequential", "joint"), help="the prompts, "
        "lines or a numbered list, are those of pictures that belong together: each sees the "
        "references only, the pictures before it, or all others, which are painted at once and "
        "which the model has to know")  # fmt: skip
    add("--same-seed", action="store_true", help="all pictures of the set begin with the same "
        "noise, which keeps layouts alike; else seeds count up")  # fmt: skip
    add("--earlier", action="append", default=[], type=Path, metavar="FILE",
        help="a finished picture of the set, to go on behind it; repeated")  # fmt: skip
    add("--cache", default="auto", metavar="SIZE", help="memory for what is read of prompts and "
        "references, kept from picture to picture: auto (default), off, 6GB, 6GB:int8")  # fmt: skip
    add("--vram", default="auto", metavar="SIZE", help="memory of the card for weights; what is "
        "beyond waits in the computer's memory and is copied block by block: auto (default: all if "
        "it fits), all, 6GB")  # fmt: skip
    add("--sheet", action="store_true", help="a contact sheet of all pictures too")
    add("--from", dest="repeat", type=Path, metavar="PNG", help="make a picture again, exactly; "
        "other options change what they say")  # fmt: skip
    add("--recipe", action="store_true", help="only show the recipe in the --from picture")
    _add_weights(add)


def _add_download(commands: argparse._SubParsersAction) -> None:
    made = _command(commands, "download", _download, "fetch the files of a published model")
    add = made.add_argument
    add("name", nargs="?", metavar="NAME", help="which model; without it, a list of them")
    add("--accept-licence", action="store_true", help="you accept the licence that is shown; "
        "otherwise you are asked")  # fmt: skip
    _add_comfyui(made)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    made = _command(commands, "demo", _demo, "make a picture of each kind, and a sheet of them")
    add = made.add_argument
    add("instruction", nargs="?", metavar="INSTRUCTION", help="how to change the picture")
    add("--picture", type=Path, metavar="FILE", help="a picture of yours to edit")
    add("--out", type=Path, default=Path("seedling-demo"), metavar="FOLDER")
    add("--seed", type=int, default=0, metavar="N")
    _add_weights(add)


def _add_weights(add: Callable) -> None:
    add("--dit", metavar="FILE", help="diffusion model: a path, a diffusers folder, or a name in "
        "the model folders; default: the embedded model")  # fmt: skip
    add("--vae", metavar="FILE", help="VAE; default: the one in --dit's folder")
    add("--encoder", metavar="FILE", help="text encoder; default: the one in --dit's folder")
    add("--precision", choices=PRECISIONS, default="stored", help="how weights are kept: stored "
        "(default), as in the file; auto, as this machine multiplies them fastest, which it tells; "
        "or all as numbers of one kind")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
    _add_comfyui(add)


def _add_comfyui(add: Callable | argparse.ArgumentParser) -> None:
    add = add.add_argument if isinstance(add, argparse.ArgumentParser) else add
    add("--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder, whose models are found by "
        "name; default: the variable COMFYUI_DIR")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
