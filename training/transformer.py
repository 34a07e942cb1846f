"""Train the embedded encoder and DiT: flow matching on text-to-image, edits, compositions, sets.

First the encoder alone learns to read (`read`), from captions and instructions to the layout of the
picture. Then both train together (`train`). The prefix of a row is computed once and serves several
noise levels, as in the engine; target and references share the engine's centred rotary grid.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.dit import DiT, DiTConfig, Prefix
from ..model_loaders.layers import KeptKeys
from ..quant.operations import has_bf16_products
from .data import Batch, Feed
from .export import NAME
from .heads import LayoutHead, TokenHead
from .projection import Projection
from .prompts import Prompts, build_encoder
from .runs import Average, Budget, Run, warm_stable_decay
from .speed import autocast, compile_training

DIT = DiTConfig(
    in_channels=64, layers=7, heads=6, head_dim=32, context_dim=192, mlp_dim=576, axes=(4, 14, 14)
)
MIDDLE = 3  # the block whose output the token head reads
DRAWS = 2  # noise levels per prefix
SHARPEN = 2.0  # rate of the attention's scales, in rates of the rest
SHARES = (0.4, 0.32, 0.14, 0.14)  # text-to-image, edit, composition, set; the first is cheapest
FORCED = 0.4  # of the rows of sets see earlier pictures as the student draws them


def optimizers(*modules: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, first and last layers, norms, heads.

    How sharply attention looks at one place is in the scales of `norm_q` and `norm_k` alone, and
    copying a reference needs products of them of 5 and more: they move faster (`SHARPEN`).
    """
    matrices, others, scales = [], [], []
    for module in modules:
        for name, p in module.named_parameters():
            inner = "transformer_blocks" in name or ".layers." in name or ".blocks." in name
            sharp = name.startswith("dit.") and ("norm_q" in name or "norm_k" in name)
            (matrices if inner and p.ndim == 2 else scales if sharp else others).append(p)
    groups = [{"params": others}, {"params": scales, "factor": SHARPEN, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Student(nn.Module):
    """Everything that is trained: encoder, DiT and the two heads."""

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.reader = build_encoder(prompts)
        self.encoder = self.reader.model
        self.dit = DiT(DIT)
        self.layout = LayoutHead(DIT.context_dim)
        self.tokens = TokenHead(DIT.dim)
        for name, p in self.dit.named_parameters():
            if p.ndim == 2:
                last = name.endswith(
                    ("proj_out.weight", "norm_out.linear.weight", "modulation.1.weight")
                )
                nn.init.normal_(p, std=0.002 if last else p.shape[1] ** -0.5)
        self.middle: list[Tensor] = []

        def keep(block: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.middle.append(output)

        self.dit.transformer_blocks[MIDDLE].register_forward_hook(keep)


def many(prefix: Prefix, draws: int) -> Prefix:
    """The prefix with every row repeated, for several targets per prefix."""
    keys = [k.repeat_interleave(draws, 0) for k in prefix.kept.keys]
    values = [v.repeat_interleave(draws, 0) for v in prefix.kept.values]
    kept = KeptKeys(keys, values, prefix.kept.length)
    return Prefix(kept, prefix.position, prefix.rotations)


def noise_levels(count: int, shift: float = 0.5, spread: float = 1.0) -> Tensor:
    """Stratified logit-normal times in 0..1, most of them in .3 to .9.

    What an object looks like is decided there: redrawn from t = .4 a trained model kept 83 % of
    the shapes, from .6 65 %, from .8 40 %.
    """
    u = ((torch.arange(count) + torch.rand(count)) / count)[torch.randperm(count)]
    return torch.sigmoid(shift + spread * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))


def loudness(latents: Tensor, power: float = 1.5) -> Tensor:
    """Weights of the channels (C, 1, 1), mean 1: coarse ones count more than grain and texture.

    Unweighted, every eighth of the channels has an eighth of the loss, though the first eighth is
    most of the picture.
    """
    weight = latents.std((0, 2, 3)) ** power
    return (weight / weight.mean())[:, None, None]


def attention_to_objects(likely: Tensor, grid: Sequence[int]) -> Tensor:
    """Weights (B, 1, h, w) of places, mean 1: objects and their rims count five times.

    Most of a picture is background. `likely` (B, tokens) is how sure the network itself is, from
    the noisy picture and the words, that an object stands there. Weights that know the answer
    would shift what is learnt, from the mean of all pictures that are still possible to those that
    have an object at this place: one wherever one might be, and rims too far out.
    """
    near = F.max_pool2d(likely.unflatten(1, grid), 3, stride=1, padding=1)
    weight = 1 + 4 * near
    return (weight / weight.mean())[:, None]


@torch.no_grad()
def redrawn(student: Student, prompts: Prompts, latents: Tensor, own: Tensor) -> Tensor:
    """Student forcing: `latents` (B, R + 1, C, h, w) with the references of some sets redrawn.

    In use the earlier pictures of a set are the model's own, with its own flaws. Here the student
    gets them noised to .1 to .4 and takes them back in one step, without words, for a share
    `FORCED` of the rows `own` (B,) bool.
    """
    rows = (own & (torch.rand(len(own)) < FORCED)).nonzero()[:, 0]
    if not len(rows):
        return latents
    clean = latents[rows, :-1].flatten(0, 1)
    t = 0.1 + 0.3 * torch.rand(len(clean))
    mixed = torch.lerp(clean, torch.randn_like(clean), t[:, None, None, None])
    ids = torch.tensor([prompts.ids("")] * len(clean))
    hidden, slots = prompts.encode(student.reader, ids, torch.zeros(len(ids), 0, 1, 1, 4))
    room = clean.shape[-2] * clean.shape[-1]
    velocity = student.dit(mixed, t, student.dit.prefix(hidden, slots, room=room))
    latents = latents.clone()
    latents[rows, :-1] = (mixed - t[:, None, None, None] * velocity).unflatten(0, (len(rows), -1))
    return latents


def losses(
    student: Student, projection: Projection, prompts: Prompts, batch: Batch
) -> dict[str, Tensor]:
    """Flow-matching loss and the two heads' losses of one batch."""
    pixels = batch.pictures.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (B, R + 1, 4, 128, 128)
    b, images = pixels.shape[:2]
    with torch.no_grad(), autocast(False):
        latents = projection.encode(pixels.flatten(0, 1)).unflatten(0, (b, images))
    latents = redrawn(student, prompts, latents, batch.own)
    hidden, slots = prompts.encode(student.reader, batch.ids, batch.pictures[:, :-1])
    layout, read = student.layout(hidden, batch.layout)
    student.middle.clear()
    references = [latents[:, i] for i in range(images - 1)]
    prefix = student.dit.prefix(hidden, slots, references)
    target = latents[:, -1].repeat_interleave(DRAWS, 0)
    t = noise_levels(b * DRAWS)
    noise = torch.randn_like(target)
    mixed = torch.lerp(target, noise, t[:, None, None, None])
    velocity = student.dit(mixed, t, many(prefix, DRAWS))
    before, after = student.middle
    labels = batch.labels[:, -1].repeat_interleave(DRAWS, 0)
    tokens, seen = student.tokens(after, labels)
    if images > 1:
        grid = torch.repeat_interleave(slots, torch.where(slots, 4, 1))
        shown = batch.labels[:, :-1].transpose(1, 2).flatten(2)
        tokens = tokens + 0.5 * student.tokens(before[:, grid], shown)[0]
    missed = (velocity.float() - (noise - target)).square() * loudness(target)
    flow = (missed * attention_to_objects(student.tokens.objects(after), target.shape[-2:])).mean()
    return {"flow": flow, "layout": layout, "tokens": tokens, "read": read, "seen": seen}


def fresh(folder: Path, stage: str) -> tuple[Run, Student, Prompts, dict]:
    torch.manual_seed(0)
    run, prompts = Run(folder, stage), Prompts(folder / "tokenizer.json")
    student = Student(prompts)
    return run, student, prompts, run.load() or {}


def read(folder: Path, minutes: float, batch: int = 32, rate: float = 2e-3) -> None:
    """Teach the encoder to read: caption in, layout out. Pictures come with `train`."""
    run, student, prompts, state = fresh(folder, "reader")
    trained = nn.ModuleDict({"encoder": student.encoder, "layout": student.layout})
    steppers = optimizers(trained, rate=rate)
    if state:
        trained.load_state_dict(state["weights"])
    budget = Budget(minutes, state.get("minutes", 0.0))
    step = first = state.get("step", 0)
    words = folder / "tokenizer.json"
    feed = Feed(words, 1000 + first, batch, (1.0, 0.0, 0.0), pictures=False, level=3)
    for step in budget.steps(first, "reader"):
        rows = next(feed)
        hidden, _ = prompts.encode(student.reader, rows.ids, rows.pictures[:, :-1])
        loss, right = student.layout(hidden, rows.layout)
        _advance(trained, steppers, loss, rate * warm_stable_decay(step, budget.progress))
        if step % 50 == 0:
            run.log(step=step, minutes=budget.spent, loss=loss.item(), right=right.item())
        if run.due():
            run.save(weights=trained.state_dict(), step=step, minutes=budget.spent)
    run.save(weights=trained.state_dict(), step=step, minutes=budget.spent)


def train(
    folder: Path,
    minutes: float,
    assets: Path,
    shares: tuple[float, ...] = SHARES,
    batch: int = 32,
    rate: float = 2.5e-3,
) -> None:
    """Joint flow-matching training; goes on where it stopped.

    A run that has not begun starts from its reader, or without one from the exported model.
    """
    begin(folder, assets)
    compile_training()
    bf16 = has_bf16_products()
    run, student, prompts, state = fresh(folder, "student")
    projection = Projection(folder, assets / "vae" / f"{NAME}.safetensors")
    steppers = optimizers(student, rate=rate)
    student.load_state_dict(state["weights"], strict="steppers" in state)
    average = Average(student, 0.997)
    if "steppers" in state:
        average.values = state["average"]
        for stepper, saved in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
    budget = Budget(minutes, state.get("minutes", 0.0))
    step = first = state.get("step", 0)
    samples = state.get("samples", 0)
    feed = Feed(folder / "tokenizer.json", 5000 + first, batch, shares)

    def save() -> None:
        run.save(
            weights=student.state_dict(),
            average=average.values,
            steppers=[s.state_dict() for s in steppers],
            step=step,
            samples=samples,
            minutes=budget.spent,
            dit=asdict(DIT),
            encoder=student.reader.config.to_json(),
        )

    for step in budget.steps(first, "student"):
        rows = next(feed)
        with autocast(bf16):
            parts = losses(student, projection, prompts, rows)
        loss = parts["flow"] + 0.3 * parts["tokens"] + 0.1 * parts["layout"]
        _advance(student, steppers, loss, rate * warm_stable_decay(step - first, budget.progress))
        average.update(student, step)
        samples += len(rows.ids)
        if step % 50 == 0:
            shown = {key: round(value.item(), 4) for key, value in parts.items()}
            references = rows.pictures.shape[1] - 1
            run.log(
                step=step, samples=samples, minutes=budget.spent, references=references, **shown
            )
        if run.due():
            save()
    save()


def begin(folder: Path, assets: Path) -> None:
    """Give a run without a student its first weights: the reader's, or those in `assets`."""
    run = Run(folder, "student")
    if run.path.exists():
        return
    reader = Run(folder, "reader").load()
    if reader is not None:
        run.save(weights=reader["weights"])
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = assets / "text_encoders" / f"{NAME}.tokenizer.json"
    shutil.copyfile(words, folder / "tokenizer.json")
    weights = {}
    for part, place in (("dit.", "diffusion_models"), ("encoder.", "text_encoders")):
        for key, value in load_file(assets / place / f"{NAME}.safetensors").items():
            weights[part + key] = value.float()
    run.save(weights=weights)


def _advance(module: nn.Module, steppers: list, loss: Tensor, rate: float) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        stepper.step()
        stepper.zero_grad()
