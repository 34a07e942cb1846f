"""Held-out prompts, pictures made by the engine's own sampler, judged by the world's checker.

Rates come with Wilson 95 % intervals; `sheet` draws what was judged, to be looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..model_loaders.families.qwen_image_21.dit import DiT, Prefix
from ..model_loaders.families.qwen_image_21.encoder import Encoder
from ..model_loaders.families.qwen_image_21.vae import VAE
from ..model_loaders.family import Schedule
from ..model_loaders.load import load_dit, load_encoder, load_vae
from ..sampling.guidance import guided
from ..sampling.noise import noise
from ..sampling.pipeline import OPAQUE_ALPHA, OPAQUE_SHARE
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import sigmas_for
from . import world
from .data import SIZE
from .export import NAME
from .prompts import Prompts


@dataclass(frozen=True)
class Case:
    """One held-out prompt with what it shows and how its picture is judged."""

    prompt: str
    language: str
    references: tuple[world.Scene, ...]
    judge: Callable[[np.ndarray, list[np.ndarray]], dict[str, float]]


@dataclass(frozen=True)
class Model:
    """The three networks, and how they are sampled."""

    dit: DiT
    encoder: Encoder
    vae: VAE
    prompts: Prompts
    schedule: Schedule
    sampler: str = "euler"


def from_assets(assets: Path) -> Model:
    """The exported model, loaded as everybody loads it."""
    dit = load_dit(assets / "diffusion_models" / f"{NAME}.safetensors")
    vae = load_vae(assets / "vae" / f"{NAME}.safetensors")
    words = assets / "text_encoders" / f"{NAME}.safetensors"
    encoder = load_encoder(words).module
    assert dit.schedule is not None
    prompts = Prompts(words.with_name(f"{NAME}.tokenizer.json"))
    return Model(dit.module, encoder, vae.module, prompts, dit.schedule)


def text_cases(count: int, objects: int, seed: int, language: str | None = None) -> list[Case]:
    """Full captions of scenes with so many objects."""
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        scene = world.sample_scene(rng, count=objects, held_out=True)
        caption, request = world.sample_caption(scene, rng, language=language, level=3)

        def judge(
            image: np.ndarray, shown: list, request: world.Request = request
        ) -> dict[str, float]:
            verdict = world.check(image, request)
            return {
                k: float(getattr(verdict, k)) for k in ("colour", "shape", "place", "fill", "ok")
            } | {"right": float(verdict.colour and verdict.shape and verdict.place)}

        cases.append(Case(caption.text, caption.language, (), judge))
    return cases


def edit_cases(count: int, seed: int) -> list[Case]:
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        edit = world.sample_edit(rng, held_out=True)

        def judge(
            image: np.ndarray, shown: list[np.ndarray], edit: world.Edit = edit
        ) -> dict[str, float]:
            verdict = world.check_edit(shown[0], image, edit)
            return {
                "right": float(verdict.done),
                "psnr": verdict.background_psnr,
                f"kind {edit.kind}": float(verdict.done),
            }

        cases.append(Case(edit.instruction.text, edit.instruction.language, (edit.before,), judge))
    return cases


def composition_cases(count: int, seed: int, references: int = 2) -> list[Case]:
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        made = world.sample_composition(rng, held_out=True)
        if len(made.references) != references:
            continue

        def judge(
            image: np.ndarray, shown: list, request: world.Request = made.request
        ) -> dict[str, float]:
            verdict = world.check(image, request)
            right = float(verdict.colour and verdict.shape and verdict.place)
            return {"right": right, "ok": float(verdict.ok)}

        cases.append(Case(made.instruction.text, made.instruction.language, made.references, judge))
    return cases


def by_length(rows: Sequence[tuple[list[int], int]], size: int) -> list[list[int]]:
    """Indices in groups of at most `size` with equal prompt length and reference count."""
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for index, (ids, references) in enumerate(rows):
        lists = groups.setdefault((len(ids), references), [[]])
        if len(lists[-1]) == size:
            lists.append([])
        lists[-1].append(index)
    return [group for lists in groups.values() for group in lists]


@torch.no_grad()
def paint(model: Model, cases: Sequence[Case], *, steps: int, guidance: float, seed: int = 0,
          batch: int = 32) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:  # fmt: skip
    """Pictures (H, W, 4) uint8 for all cases, and the reference pictures they saw."""
    shown = [[world.render(scene, SIZE) for scene in case.references] for case in cases]
    prompts = [case.prompt for case in cases]
    settings = {"steps": steps, "guidance": guidance, "seed": seed, "batch": batch}
    return paint_shown(model, prompts, shown, **settings), shown


@torch.no_grad()
def paint_shown(model: Model, prompts: Sequence[str], shown: Sequence[Sequence[np.ndarray]], *,
                steps: int, guidance: float, seed: int = 0,
                batch: int = 32) -> list[np.ndarray]:  # fmt: skip
    """A picture (H, W, 4) uint8 for each prompt, which is `shown` its references, in that form."""
    rows = [
        (model.prompts.ids(prompt, [(SIZE, SIZE)] * len(seen)), len(seen))
        for prompt, seen in zip(prompts, shown, strict=True)
    ]
    pictures: list[np.ndarray] = [np.empty(0)] * len(prompts)
    sigmas = sigmas_for(model.schedule, steps, (SIZE // 16) ** 2)
    for group in by_length(rows, batch):
        none = np.zeros((0, SIZE, SIZE, 4), np.uint8)
        images = torch.from_numpy(
            np.stack([np.stack(shown[i]) if shown[i] else none for i in group])
        )
        pixels = images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        latents = [model.vae.encode(pixels[:, i]) for i in range(pixels.shape[1])]
        positive = _prefix(model, [rows[i][0] for i in group], images, latents)
        empty = model.prompts.ids("", [(SIZE, SIZE)] * images.shape[1])
        negative = _prefix(model, [empty] * len(group), images, latents) if guidance != 1 else None

        def velocity(
            x: Tensor, sigma: float, positive: Prefix = positive, negative: Prefix | None = negative
        ) -> Tensor:
            t = torch.full((len(x),), sigma)
            v = model.dit(x, t, positive)
            return v if negative is None else guided(v, model.dit(x, t, negative), guidance)

        x = torch.stack([noise(seed, i, (64, SIZE // 16, SIZE // 16)) for i in group])
        for state in SAMPLERS[model.sampler](velocity, x, sigmas):
            x = state.x
        decoded = ((model.vae.decode(x) + 1) * 127.5).round().clamp(0, 255).byte()
        for i, picture in zip(group, decoded.permute(0, 2, 3, 1).numpy(), strict=True):
            pictures[i] = picture
    return pictures


def paint_sets(model: Model, prompts: Sequence[Sequence[str]], *, seeing: bool, steps: int,
               guidance: float, seed: int = 0) -> list[list[np.ndarray]]:  # fmt: skip
    """The pictures of sets of one length, `prompts[i][k]` each, as the engine's sets make them.

    Picture k of set i has the seed `seed` + i + k and, when `seeing`, sees the k before it.
    """
    sets: list[list[np.ndarray]] = [[] for _ in prompts]
    for k in range(len(prompts[0])):
        shown = [[_shown_again(picture) for picture in made if seeing] for made in sets]
        texts = [texts[k] for texts in prompts]
        settings = {"steps": steps, "guidance": guidance, "seed": seed + k}
        for made, picture in zip(sets, paint_shown(model, texts, shown, **settings), strict=True):
            made.append(picture)
    return sets


def _shown_again(picture: np.ndarray) -> np.ndarray:
    """A finished picture as a reference: where it is opaque it loses its alpha, as in a file."""
    if (picture[..., 3] > 255 * OPAQUE_ALPHA).mean() < OPAQUE_SHARE:
        return picture
    return np.dstack([picture[..., :3], np.full_like(picture[..., :1], 255)])


def _prefix(model: Model, ids: list[list[int]], images: Tensor, latents: list[Tensor]) -> Prefix:
    hidden, slots = model.prompts.encode(model.encoder, torch.tensor(ids), images)
    return model.dit.prefix(hidden, slots, latents, room=(SIZE // 16) ** 2)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % interval of a rate seen in `count` trials."""
    z = 1.96
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    )
    return middle - half, middle + half


def score(
    model: Model, cases: Sequence[Case], **options
) -> tuple[dict, list[np.ndarray], list[list[np.ndarray]]]:
    """Means of everything the judges report, `right` also by language with intervals."""
    pictures, shown = paint(model, cases, **options)
    verdicts = [case.judge(p, s) for case, p, s in zip(cases, pictures, shown, strict=True)]
    keys = sorted({key for verdict in verdicts for key in verdict})
    result: dict = {"count": len(cases)}
    for key in keys:
        values = [v[key] for v in verdicts if key in v]
        result[key] = round(float(np.mean(values)), 4)
        if key == "psnr":
            result["psnr of edits done"] = round(
                float(np.mean([v[key] for v in verdicts if v["right"]] or [0])), 2
            )
            result["psnr at least 28 dB"] = round(float(np.mean(np.array(values) >= 28)), 4)
    result["interval"] = [round(v, 4) for v in wilson(result["right"], len(cases))]
    for language in ("en", "zh"):
        right = [v["right"] for c, v in zip(cases, verdicts, strict=True) if c.language == language]
        result[language] = round(float(np.mean(right)), 4) if right else None
    return result, pictures, shown


def suites(count: int) -> dict[str, list[Case]]:
    return {
        "one object": text_cases(count, 1, 11),
        "two objects": text_cases(count, 2, 12),
        "edit": edit_cases(count, 13),
        "compose two": composition_cases(count, 14),
    }


def score_sets(
    model: Model, count: int, seed: int = 15, **options: Any
) -> tuple[dict, list[list[np.ndarray]], list[world.PictureSet]]:
    """Held-out sets of four: is every object painted again as it was painted first, and as told?

    Beside it the same prompts, and full captions of the same pictures, without references. There
    are no photographs, on which the checker itself errs too often for four pictures in a row.
    """
    rng = np.random.default_rng(seed)
    kinds = [world.SET_KINDS[i % len(world.SET_KINDS)] for i in range(count)]
    sets = [world.sample_set(rng, kind=kind, count=4, held_out=True, photo=0.0) for kind in kinds]
    told = [[panel.caption.text for panel in made.panels] for made in sets]
    full = [
        [world.opening(p.scene, p.caption.language, rng).caption.text for p in made.panels]
        for made in sets
    ]
    result: dict = {"count": count}
    shown: list[list[np.ndarray]] = []
    arms = {"sequential": told, "independent": told, "independent, full captions": full}
    for name, prompts in arms.items():
        pictures = paint_sets(model, prompts, seeing=name == "sequential", **options)
        verdicts = [world.check_set(p, made) for p, made in zip(pictures, sets, strict=True)]
        result[name] = _set_rates(verdicts, kinds)
        shown = shown or pictures
    return result, shown, sets


def _set_rates(verdicts: Sequence[world.SetVerdict], kinds: Sequence[str]) -> dict:
    """Identity with its interval, kept and told picture by picture, identity by kind."""
    identity = np.array([verdict.identity for verdict in verdicts], float)
    rates: dict = {"identity": round(float(identity.mean()), 4)}
    rates["interval"] = [round(v, 4) for v in wilson(rates["identity"], len(identity))]
    for name in ("attributes", "kept", "told"):
        values = np.array([getattr(verdict, name) for verdict in verdicts], float)
        rates[name] = np.atleast_1d(values.mean(0)).round(4).tolist()
    rates["all told too"] = round(float(np.mean([v.identity and all(v.told) for v in verdicts])), 4)
    for kind in dict.fromkeys(kinds):
        rates[kind] = round(float(identity[[k == kind for k in kinds]].mean()), 4)
    return rates


def evaluate(model: Model, out: Path, count: int = 500) -> dict:
    """All suites with the file's own steps and guidance; a quarter as many sets of four.

    Writes scores.json, after each suite, and one sheet a suite into `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps, guidance = model.schedule.steps, model.schedule.guidance
    results: dict = {"steps": steps, "guidance": guidance}
    for name, cases in suites(count).items():
        results[name], pictures, shown = score(model, cases, steps=steps, guidance=guidance)
        sheet(cases[:24], pictures, shown).save(out / f"{name.replace(' ', '-')}.png")
        (out / "scores.json").write_text(json.dumps(results, indent=1))
    scores, made, sets = score_sets(model, -(-count // 4), steps=steps, guidance=guidance)
    results["sets of four"] = scores
    texts = [" | ".join(panel.caption.text for panel in one.panels) for one in sets[:12]]
    rows = [Case(text, "", (), _unjudged) for text in texts]
    sheet(rows, [m[-1] for m in made], [m[:-1] for m in made], 2).save(out / "sets-of-four.png")
    (out / "scores.json").write_text(json.dumps(results, indent=1))
    return results


def _unjudged(image: np.ndarray, shown: list[np.ndarray]) -> dict[str, float]:
    return {}


def sheet(cases: Sequence[Case], pictures: Sequence[np.ndarray], shown: Sequence[list[np.ndarray]],
          columns: int = 4) -> Image.Image:  # fmt: skip
    """References and result side by side with the prompt underneath."""
    width = SIZE * (1 + max(len(s) for s in shown[: len(cases)])) + 8
    rows = -(-len(cases) // columns)
    canvas = Image.new("RGB", (columns * width, rows * (SIZE + 30)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, case in enumerate(cases):
        x, y = i % columns * width, i // columns * (SIZE + 30)
        for j, picture in enumerate([*shown[i], pictures[i]]):
            tile = Image.fromarray(picture, "RGBA")
            canvas.paste(tile, (x + j * (SIZE + 2), y), tile)
        text = (
            case.prompt if case.prompt.isascii() else case.prompt.encode("unicode_escape").decode()
        )
        pen.text((x, y + SIZE + 2), f"{text[:44]}\n{text[44:88]}", fill="black")
    return canvas
