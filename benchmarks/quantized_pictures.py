"""What quantization costs in pictures: the embedded model in every format, beside full precision.

Prompts and edits of the training world, held out from training, are painted by the model in full
precision and by each quantized one, from the same noise. For each suite:

*dB*: the mean of the pictures' PSNR to full precision, with its 95 % interval. It is not the PSNR
of the mean error, which one picture decides that turned out another one: *changed %* counts those,
below 25 dB. *Features*: a distance built like LPIPS, from features of the VAE's encoder at three
depths (after its first layer, its blocks and its middle): each channel brought to the mean 0 and
the deviation 1 of the pictures in full precision, then unit length at each place, and the mean
squared difference (0 to 4). It is not LPIPS, whose network and weights know people's judgements.
*Right %*: the world's checker, with its 95 % interval.

Formats are compared by bits for each weight, scales included. "Ours" is `seedling quantize`, its
calibration 8 prompts and 8 edits, none of which is measured; in a second row with layers of 6 bits
and inputs that are not rounded, as those of the others, but for int8 and float8 on cards, are not.
The others are rounded without calibration. Layers are multiplied as a CPU does: only int8 rounds
inputs. At last, for each of ours, the best of the others at the same bytes (1 % more at most).

`--rows ours,NF4` measures those whose names hold one of these words. `--work FOLDER` keeps trials
and finished rows, so a run that was stopped goes on at the next row; a folder holds those of many
models. `--threads 2` measures two rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..host.models import embedded
from ..model_loaders.load import load_dit
from ..quant.linear import Buffer, QuantizedLinear
from ..sampling.guidance import guided
from ..sampling.noise import noise
from ..sampling.pipeline import Pipeline, Task
from ..sampling.quantizing import Wish, quantize, units_of
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import sigmas_for
from ..training import world
from ..training.data import SIZE
from ..training.evaluate import (
    Case,
    Model,
    by_length,
    edit_cases,
    from_assets,
    text_cases,
    wilson,
)
from ._rounded_weights import STORES
from .protocol import arguments, show

BUDGETS = (4.25, 4.5, 5.25, 6.25, 8.25)
CALIBRATION = 8  # prompts, and as many edits
CHANGED = 25.0  # dB
MOST = 80.0  # dB: equal pictures count as this near
FULL = "bf16, full precision"
WHOLE = ", layers of 6 too, inputs whole"
GRID = SIZE // 16  # of latents
BATCH = 32


@dataclass(frozen=True)
class Group:
    """Cases with prompts of one length, and all that no quantization of the DiT changes."""

    cases: tuple[int, ...]
    prompts: tuple[tuple[Tensor, Tensor], ...]  # with guidance two: states and slots
    references: tuple[Tensor, ...]  # latents
    start: Tensor


class Suite:
    """Cases, painted by any network in the same way, and judged."""

    def __init__(self, model: Model, cases: Sequence[Case], steps: int) -> None:
        self.model, self.cases = model, cases
        self.sigmas = sigmas_for(model.schedule, steps, GRID**2)
        self.shown = [[world.render(scene, SIZE) for scene in case.references] for case in cases]
        rows = [(self._ids(k, case.prompt), len(self.shown[k])) for k, case in enumerate(cases)]
        self.groups = [self._group(own, rows) for own in by_length(rows, BATCH)]

    def _ids(self, k: int, prompt: str) -> list[int]:
        return self.model.prompts.ids(prompt, [(SIZE, SIZE)] * len(self.shown[k]))

    def _group(self, own: list[int], rows: list[tuple[list[int], int]]) -> Group:
        model, none = self.model, np.zeros((0, SIZE, SIZE, 4), np.uint8)
        images = torch.from_numpy(
            np.stack([np.stack(self.shown[k]) if self.shown[k] else none for k in own])
        )
        pixels = images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        asked = [[rows[k][0] for k in own]]
        if model.schedule.guidance != 1:
            asked.append([self._ids(own[0], "")] * len(own))
        return Group(
            tuple(own),
            tuple(model.prompts.encode(model.encoder, torch.tensor(ids), images) for ids in asked),
            tuple(model.vae.encode(pixels[:, i]) for i in range(pixels.shape[1])),
            torch.stack([noise(0, k, (64, GRID, GRID)) for k in own]),
        )

    def paint(self, network: Any) -> Tensor:
        """Pictures (n, 4, H, W) in 0..1."""
        pictures = torch.empty(len(self.cases), 4, SIZE, SIZE)
        for group in self.groups:
            read = [network.prefix(*p, group.references, room=GRID**2) for p in group.prompts]

            def velocity(x: Tensor, sigma: float, read: list[Any] = read) -> Tensor:
                t = torch.full((len(x),), sigma)
                with_prompt, *without = (network(x, t, prefix) for prefix in read)
                guidance = self.model.schedule.guidance
                return guided(with_prompt, without[0], guidance) if without else with_prompt

            x = group.start
            for state in SAMPLERS[self.model.sampler](velocity, x, self.sigmas):
                x = state.x
            pictures[list(group.cases)] = ((self.model.vae.decode(x) + 1) / 2).clamp(0, 1)
        return pictures

    def compare(self, pictures: Tensor, exact: Tensor) -> dict[str, object]:
        count = len(self.cases)
        error = (pictures - exact)[:, :3].square().flatten(1).mean(1)
        near = -10 * error.clamp_min(10 ** (-MOST / 10)).log10()
        half = 1.96 * float(near.std()) / count**0.5 if count > 1 else 0.0
        bytes = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
        judged = zip(self.cases, bytes, self.shown, strict=True)
        right = float(np.mean([case.judge(p, s)["right"] for case, p, s in judged]))
        low, high = wilson(right, count)
        far = self._apart(pictures, exact)
        return {
            "dB": f"{float(near.mean()):.1f} ± {half:.1f}" if error.any() else "exact",
            "features": float(f"{far:.3g}"),
            "changed %": round(100 * float((near < CHANGED).float().mean()), 1),
            "right %": f"{100 * right:.1f} ({100 * low:.1f}-{100 * high:.1f})",
        }

    def _apart(self, a: Tensor, b: Tensor) -> float:
        total, pairs = 0.0, [*zip(self._features(a), self._features(b), strict=True)]
        for x, y in pairs:
            deviation, mean = torch.std_mean(y, (0, 2, 3), keepdim=True)
            u, v = (F.normalize((z - mean) / deviation.clamp_min(1e-6), dim=1) for z in (x, y))
            total += float((u - v).square().sum(1).mean())
        return total / len(pairs)

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """(n, C, h, w) at each depth."""
        found: list[list[Tensor]] = [[], [], []]
        encoder = self.model.vae.encoder
        layers = (encoder.conv_in, encoder.down_blocks[-1], encoder.mid_block)
        hooks = [
            layer.register_forward_hook(lambda _, __, y, own=own: own.append(y))
            for layer, own in zip(layers, found, strict=True)
        ]
        for part in pictures.split(BATCH):
            self.model.vae.encode(part * 2 - 1)
        for hook in hooks:
            hook.remove()
        return [torch.cat(own) for own in found]


class Measured:
    """The suites, and what a model paints of them in full precision; kept in `folder`."""

    def __init__(self, folder: Path, count: int, steps: int) -> None:
        files = embedded()
        self.path, model = files["dit"], from_assets(files["dit"].parents[1])
        steps = steps or model.schedule.steps
        digest = hashlib.sha256(b"".join(files[kind].read_bytes() for kind in sorted(files)))
        self.model_folder = folder / digest.hexdigest()[:16]
        self.folder = self.model_folder / f"{count}-{steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        cases = {"prompts": text_cases(count, 1, 93), "edits": edit_cases(count, 94)}
        self.suites = {name: Suite(model, own, steps) for name, own in cases.items()}
        self.units = units_of(load_dit(self.path))
        kept = self.folder / "exact.safetensors"
        if not kept.exists():
            network = load_dit(self.path, dtype=torch.float32).module
            part = kept.with_suffix(".part")
            save_file({name: suite.paint(network) for name, suite in self.suites.items()}, part)
            part.replace(kept)
        self.exact = load_file(kept)

    def kept(self, name: str) -> Path:
        plain = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self.folder / f"{plain}.json"

    def row(self, name: str) -> dict[str, object]:
        file = self.kept(name)
        if file.exists():
            return json.loads(file.read_text("utf-8"))
        network, bits = self.made(name)
        row: dict[str, object] = {"weights as": name, "bits": round(bits, 2)}
        for kind, suite in self.suites.items():
            pictures = self.exact[kind] if name == FULL else suite.paint(network)
            found = suite.compare(pictures, self.exact[kind])
            row |= {f"{kind}: {what}": value for what, value in found.items()}
        file.with_suffix(".part").write_text(json.dumps(row), "utf-8")
        file.with_suffix(".part").replace(file)
        return row

    def made(self, name: str) -> tuple[nn.Module, float]:
        """The network of a row, and its bits for each weight."""
        if name in OURS:
            return self.ours(name)
        network, buffer, size = load_dit(self.path, dtype=torch.float32).module, Buffer(), 0.0
        if name == FULL:
            return network, 16
        for unit in self.units:
            layout, taken = STORES[name](unit.weight())
            size += taken
            (layer,) = unit.layers  # the embedded model's file fuses none
            network.set_submodule(layer, QuantizedLinear(layout, None, buffer))
        return widened_once(network), 8 * size / sum(unit.weights for unit in self.units)

    def ours(self, name: str) -> tuple[nn.Module, float]:
        """Of the file that `seedling quantize` makes; its trials are made once for a model."""
        bits, whole = OURS[name]
        files = embedded()
        pipeline = Pipeline.load(files["dit"], files["vae"], files["encoder"])
        cases = [*text_cases(CALIBRATION, 1, 91), *edit_cases(CALIBRATION, 92)]
        tasks = [
            Task(case.prompt, tuple(_picture(scene) for scene in case.references), seed=k)
            for k, case in enumerate(cases)
        ]
        trials = self.model_folder / "trials"
        wish = Wish(bits, trials=trials, six=whole, inputs=16 if whole else 8)
        out = self.folder / f"{self.kept(name).stem}.safetensors"
        out.unlink(missing_ok=True)
        made = quantize(pipeline, tasks, out, wish)
        return widened_once(load_dit(made.out, dtype=None).module), made.bits


OURS = {
    f"ours, within {bits:g} bits{words}": (bits, bool(words))
    for bits in BUDGETS
    for words in ("", WHOLE)
}
NAMES = (FULL, *OURS, *STORES)


def widened_once(network: nn.Module) -> nn.Module:
    """Layers whose inputs are not rounded as plain ones, in full precision: the same numbers."""
    for path, layer in [*network.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            weight = None if layer.layout.native else layer.layout.weight()
        elif isinstance(layer, nn.Linear):
            weight = layer.weight
        else:
            continue
        if weight is not None:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            plain.bias = layer.bias  # type: ignore[assignment]
            network.set_submodule(path, plain)
    return network


def _picture(scene: Any) -> Tensor:
    return torch.from_numpy(world.render(scene, SIZE)).float() / 255


# ---- many rows ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def measured(folder: Path, count: int, steps: int) -> Measured:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return Measured(folder, count, steps)


def one_row(name: str, *about: Any) -> dict[str, object]:
    return measured(*about).row(name)


def all_rows(names: Sequence[str], about: tuple[Any, ...], at_once: int) -> Iterator[Any]:
    """As they are done. The first of ours makes the trials for all of them, beside the others."""
    if at_once == 1:
        yield from (one_row(name, *about) for name in names)
        return
    one_row(FULL, *about)  # so that what is exact is painted once
    first = [name for name in names if name in OURS][:1]
    rest = [name for name in names if name in OURS and name not in first]
    others = [name for name in names if name not in OURS]
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        left = {pool.submit(one_row, name, *about): name for name in (*first, *others)}
        while left:
            done = next(as_completed(left))
            name = left.pop(done)
            yield done.result()
            if name in first:
                left |= {pool.submit(one_row, name, *about): name for name in rest}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far each of ours is from the best of the others at the same bytes."""

    def near(row: dict[str, Any], kind: str) -> float:
        return float(row[f"{kind}: dB"].split()[0])

    others = [row for row in rows if row["weights as"] in STORES]
    lines = []
    for own in (row for row in rows if row["weights as"] in OURS):
        equal = [row for row in others if row["bits"] <= 1.01 * OURS[own["weights as"]][0]]
        words = []
        for kind in ("prompts", "edits") if equal else ():
            best = max(equal, key=lambda row: near(row, kind))
            ahead = near(own, kind) - near(best, kind)
            words.append(
                f"{kind} {10 ** (-ahead / 10):.2f} of the loss of {best['weights as']} "
                f"({ahead:+.1f} dB)"
            )
        if words:
            lines.append(f"{own['weights as']}: {'; '.join(words)}")
    return lines


def main() -> None:
    args = arguments(__doc__, tiny={"count": 1, "steps": 2, "rows": "4.25,NF4,SVDQuant,mxfp8"},
                     count=200, steps=0, rows="", work="")  # fmt: skip
    title = f"Pictures of the embedded model, {args.count} prompts and {args.count} edits"
    words = [word.strip().lower() for word in args.rows.split(",") if word.strip()]
    wanted = [name for name in NAMES if any(word in name.lower() for word in words) or not words]
    names = [FULL, *(name for name in wanted if name != FULL)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as kept:
        about = (Path(args.work or kept), args.count, args.steps)
        for row in all_rows(names, about, args.threads):
            found[row["weights as"]] = row
            print(f"{len(found)} of {len(names)}: {row['weights as']}", file=sys.stderr, flush=True)
    rows = [found[name] for name in names]
    if args.json:
        show(title, rows, as_json=True, notes=verdicts(rows))
        return
    print(f"{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    print("\n".join(f"| {' | '.join(map(str, row.values()))} |" for row in rows))
    print("\n".join(("", *verdicts(rows))))


if __name__ == "__main__":
    main()
