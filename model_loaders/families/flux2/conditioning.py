"""What the DiT reads besides the target and the time: the prompt and the references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint import CheckpointError
from ...family import read_once
from .sizes import STEP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...layers import Store
    from ...load import Loaded
    from .dit import DiT, Prefix
    from .encoder import Encoder


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
    **read: float,
) -> Prefix:
    """The DiT's prefix of a prompt and its references.

    `images` are not looked at; `latents` (1, C, H / 16, W / 16) of them are; `room` is the target's
    number of tokens; `dtype` is what the DiT computes in; `read` is `guidance=`, for networks that
    read it. What `store` knows is not computed again.
    """
    hidden = read_once(store, encoder, prompt, images).hidden.to(dtype)
    given = [x.to(dtype) for x in latents]
    return dit.prefix(hidden, None, given, room, store=store, **read)


def channels(dit: Loaded) -> int:
    """Latent channels of the pictures that a DiT makes."""
    return dit.config.in_channels


def check(dit: Loaded, vae: Loaded, encoder: Loaded) -> None:
    """Raise CheckpointError unless the three networks fit together."""
    if vae.config.z_dim != dit.config.in_channels or vae.config.factor != STEP:
        raise CheckpointError(
            f"{vae.checkpoint.name} makes latents of {vae.config.z_dim} channels for "
            f"{vae.config.factor} x {vae.config.factor} pixels, but {dit.checkpoint.name} works on "
            f"{dit.config.in_channels} for {STEP} x {STEP}; choose the VAE that was published with "
            "the diffusion model."
        )
    if encoder.config.width != dit.config.context_dim:
        raise CheckpointError(
            f"{encoder.checkpoint.name} has states of {encoder.config.hidden} channels, "
            f"{len(encoder.config.read)} for each word, but {dit.checkpoint.name} reads "
            f"{dit.config.context_dim}; choose the text encoder that was published with the "
            "diffusion model: Qwen3-4B for klein 4B, Qwen3-8B for klein 9B, Mistral Small for dev."
        )
