"""A step of the DiT of FLUX.2 in fp32: ours against diffusers; and references cached or not.

The published width of klein, cut down in depth. What no step changes (text, references) goes in
before on our side; diffusers projects it again in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.families.flux2.configs import published_dits
from ..model_loaders.families.flux2.dit import DiT, DiTConfig
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range
WORDS = 512  # the text encoder's, always
SIGMAS = (1.0, 0.9674, 0.9081, 0.7672)  # klein's four steps at 1024 x 1024


def config_of(double: int, single: int, heads: int) -> DiTConfig:
    """The published network, cut down; heads of 128 channels are the published ones."""
    dim = 128 * heads
    return DiTConfig(
        double=double, single=single, heads=heads, context_dim=min(7680, 3 * dim), mlp_dim=3 * dim
    )


def random_dits(c: DiTConfig) -> tuple[Any, DiT]:
    """Diffusers' network and ours over the same random weights, fp32."""
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    torch.manual_seed(0)
    theirs = Flux2Transformer2DModel(
        num_layers=c.double, num_single_layers=c.single, num_attention_heads=c.heads,
        joint_attention_dim=c.context_dim, guidance_embeds=False,
    )  # fmt: skip
    for weight in theirs.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    weights = dict(theirs.state_dict())
    scale, shift = weights.pop("norm_out.linear.weight").chunk(2)
    weights |= {"norm_out.scale.weight": scale, "norm_out.shift.weight": shift}
    ours = DiT(c, device="meta")
    ours.load_state_dict(weights, assign=True)
    return theirs.requires_grad_(False).eval(), ours.requires_grad_(False).eval()


def their_velocity(
    theirs: Any, x: Tensor, t: Tensor, text: Tensor, references: Sequence[Tensor]
) -> Tensor:
    """What diffusers' pipeline calls in a step, as a picture (1, C, h, w)."""
    pictures = [x, *references]
    one, positions = torch.arange(1), []
    for i, picture in enumerate(pictures):
        h, w = picture.shape[-2:]
        positions.append(torch.cartesian_prod(one + 10 * i, torch.arange(h), torch.arange(w), one))
    words = torch.cartesian_prod(one, one, one, torch.arange(text.shape[1]))
    out = theirs(
        hidden_states=torch.cat([p.flatten(2).transpose(1, 2) for p in pictures], dim=1),
        encoder_hidden_states=text, timestep=t, img_ids=torch.cat(positions), txt_ids=words,
        return_dict=False,
    )[0]  # fmt: skip
    h, w = x.shape[-2:]
    return out[:, : h * w].transpose(1, 2).unflatten(2, (h, w))


def random_scene(
    c: DiTConfig, side: int, references: Sequence[int], words: int = WORDS
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Text, square references with these sides in tokens, and a target of `side`."""
    pictures = [torch.randn(1, c.in_channels, s, s) for s in (*references, side)]
    return torch.randn(1, words, c.context_dim), pictures[:-1], pictures[-1]


@torch.no_grad()
def step(c: DiTConfig, side: int, references: list[int], runs: int) -> dict[str, object]:
    """One row: a step of a target of side x side tokens."""
    theirs, ours = random_dits(c)
    text, given, x = random_scene(c, side, references)
    t = torch.tensor([SIGMAS[2]])
    prefix = ours.prefix(text, None, given)
    (known,) = ours.modulations([SIGMAS[2]], x.dtype)
    own = partial(ours, x, t, prefix, known)
    other = partial(their_velocity, theirs, x, t, text, given)
    error = difference(own(), other(), LIMIT)
    times = interleave({"diffusers": other, "seedling": own}, runs)
    return row(c, x, len(given), times["diffusers"], times["seedling"], error)


@torch.no_grad()
def cached(c: DiTConfig, side: int, words: int, count: int, runs: int) -> dict[str, object]:
    """One row: klein's four steps, the references run in every one of them or in the first."""
    _, ours = random_dits(c)
    ours.config = replace(c, cached=True)
    text, given, x = random_scene(c, side, [side] * count, words)

    def run(keep: bool) -> Tensor:
        prefix, v = ours.prefix(text, None, given, side * side), x
        for i, sigma in enumerate(SIGMAS):
            if i and not keep:
                prefix = ours.prefix(text, None, given, side * side)
            v = ours(v, torch.tensor([sigma]), prefix)
        return v

    kept, again = partial(run, True), partial(run, False)
    error = difference(kept(), again(), 0.0)
    times = interleave({"again": again, "kept": kept}, runs)
    bound = in_theory(c, side**2, words, count * side**2)
    measured = row(c, x, count, times["again"], times["kept"], error)
    return {"words": words, **measured, "in theory": bound}


def in_theory(c: DiTConfig, target: int, words: int, references: int) -> float:
    """The gain of cached references over four steps, were every multiplication as fast."""
    wide = 3 * c.dim + 2 * c.mlp_dim  # columns of a block's first layer
    block = c.dim * (wide + c.dim + c.mlp_dim)  # multiplications of a token, in both kinds alike

    def pairs(queries: int, keys: int) -> int:
        return 2 * c.dim * queries * keys

    seen, own = references + target + words, target + words
    # Of the last layer only the references' keys and values are read, and the target's output.
    before = (c.layers - 1) * (references * block + pairs(references, references))
    before += references * c.dim * wide
    step = (c.layers - 1) * (own * block + pairs(own, seen))
    step += own * c.dim * wide + target * (block - c.dim * wide) + pairs(target, seen)
    return len(SIGMAS) * (before + step) / (before + len(SIGMAS) * step)


def row(c: DiTConfig, x: Tensor, references: int, base: Any, own: Any, error: float) -> Any:
    return {
        "network": f"{c.double} + {c.single} blocks x {c.dim}",
        "target": x.shape[-2] * x.shape[-1],
        "references": references,
        "base min s": base.shortest,
        "seedling min s": own.shortest,
        "speed, min": base.shortest / own.shortest,
        "speed, median": base.median / own.median,
        "difference": error,
    }


def main() -> None:
    tiny = {"single": 2, "heads": 1, "side": 4, "deep": 1, "narrow": 1, "large": 4, "words": 8}
    sizes = {"single": 3, "heads": 24, "side": 16}
    # An eighth of klein 9B's width, and of the tokens of a megapixel and of the text.
    sizes |= {"deep": 3, "narrow": 4, "large": 22, "words": 64}
    args = arguments(__doc__, tiny=tiny, **sizes)
    c = config_of(1, args.single, args.heads)
    rows = [step(c, args.side, sides, args.runs) for sides in ([], [args.side])]
    notes = ["target in tokens, 512 of text; difference relative to the output's range"]
    show("A step of FLUX.2's DiT, fp32, base: diffusers", rows, args.json, notes)
    narrow = config_of(args.deep, 3 * args.deep, args.narrow)
    rows = [cached(narrow, args.large, args.words, 3, args.runs)]
    whole = in_theory(published_dits()["FLUX.2 klein 9B"], 4096, WORDS, 3 * 4096)
    notes = [
        "four steps; the cache changes no bit; in theory: by counted multiplications",
        f"in theory, klein 9B-KV, 1024 x 1024 with three such references: {whole:.3g}",
    ]
    show(
        "FLUX.2 with cached references, base: references run in every step", rows, args.json, notes
    )


if __name__ == "__main__":
    main()
