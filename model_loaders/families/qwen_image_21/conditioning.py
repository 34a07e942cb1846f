"""What the DiT reads before it paints: the prompt, with the references in its midst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint import CheckpointError
from .sizes import STEP

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
    (1, C, H / 16, W / 16) of the same, for the DiT; `room` is the target's number of tokens;
    `dtype` is what the DiT computes in. What `store` knows is not computed again.
    """
    read = encoder.encode(prompt, images, store)
    given = [x.to(dtype) for x in latents]
    return dit.prefix(read.hidden.to(dtype), read.slots, given, room, store)


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
