"""What the DiT reads before it paints: the prompt, with the references in its midst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint import CheckpointError
from ...family import OwnSize
from .sizes import STEP, reference_size, resize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...layers import Store
    from ...load import Loaded
    from .dit import DiT, Prefix
    from .encoder import Encoder

TOKEN = STEP // 2  # pixels per side of a latent token


def prefix(
    dit: DiT,
    encoder: Encoder,
    prompt: str,
    images: Sequence[Tensor],
    latents: Sequence[Tensor],
    *,
    room: int,
    dtype: torch.dtype,
    store: Store | None = None,
) -> Prefix:
    """The DiT's prefix of a prompt and its references.

    `images` (H, W, 3 or 4) in 0..1 with sides that are multiples of 32, for the encoder; `latents`
    (1, C, h, w) of the same, in these sizes or in others, for the DiT; `room` is the target's
    number of tokens; `dtype` is what the DiT computes in. What `store` knows is not computed again.
    """
    read = encoder.encode(prompt, images, store)
    given = [x.to(dtype) for x in latents]
    hidden, slots = fit(read.hidden, read.slots, given)
    return dit.prefix(hidden.to(dtype), slots, given, room, store)


# ---- references that the encoder sees in sizes of their own ------------------------------------


def show(given: Sequence[Tensor], shown: Sequence[Tensor], sides: Sequence[int]) -> list[Tensor]:
    return [
        resize(image, reference_size(image.shape[1], image.shape[0], side**2)) if side else ready
        for image, ready, side in zip(given, shown, sides, strict=True)
    ]


def tokens(width: int, height: int, side: int) -> int:
    """Vision tokens of a picture, in the area of a square, or as it is."""
    width, height = reference_size(width, height, side**2)
    return width * height // STEP**2


def fit(hidden: Tensor, slots: Tensor, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States (1, L, C) and slots (L,) with four latent tokens for each slot.

    The states in slots are not read, only how many there are; those of the words, which have seen
    the pictures in the encoder's size, stay as they are.
    """
    import torch

    needed = [x.shape[-2] * x.shape[-1] // 4 for x in latents]
    values, lengths = torch.unique_consecutive(slots, return_counts=True)
    runs = lengths.tolist()
    if sum(needed) == int(slots.sum()) or int(values.sum()) != len(needed):
        return hidden, slots  # the DiT says what does not fit
    parts, wanted, left = [], [], iter(needed)
    for is_picture, states in zip(values.tolist(), hidden.split(runs, dim=1), strict=True):
        count = next(left) if is_picture else states.shape[1]
        parts.append(states[:, :1].expand(-1, count, -1) if is_picture else states)
        wanted.append(slots.new_full((count,), is_picture))
    return torch.cat(parts, dim=1), torch.cat(wanted)


OWN_SIZE = OwnSize(show, lambda sides: {}, tokens, fit)


def channels(dit: Loaded) -> int:
    """Latent channels of the pictures that a DiT makes."""
    return dit.config.in_channels


def check(dit: Loaded, vae: Loaded, encoder: Loaded) -> None:
    """Raise CheckpointError unless the three networks fit together."""
    if vae.config.z_dim != dit.config.in_channels:
        raise CheckpointError(
            f"{vae.checkpoint.name} makes latents of {vae.config.z_dim} channels, but "
            f"{dit.checkpoint.name} works on {dit.config.in_channels}; choose the VAE that was "
            "published with the diffusion model."
        )
    if vae.config.factor != TOKEN:
        raise CheckpointError(
            f"{vae.checkpoint.name} makes a latent of {vae.config.factor} x {vae.config.factor} "
            f"pixels, but {dit.checkpoint.name} needs {TOKEN} x {TOKEN}; choose the VAE that was "
            "published with the diffusion model."
        )
    if encoder.config.hidden != dit.config.context_dim:
        raise CheckpointError(
            f"{encoder.checkpoint.name} has states of {encoder.config.hidden} channels, but "
            f"{dit.checkpoint.name} reads {dit.config.context_dim}; choose the text encoder that "
            "was published with the diffusion model."
        )
