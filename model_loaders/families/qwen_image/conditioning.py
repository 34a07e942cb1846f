"""What the DiT reads besides the picture that it paints: the prompt and the references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoint import CheckpointError
from ...family import OwnSize, read_once
from .sizes import AREA_VLM, SLOT, STEP, vlm_size
from .variants import EDIT, EDITORS, LAYERED, VARIANTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...layers import Store
    from ...load import Loaded
    from .dit import DiT, Prefix
    from .encoder import Encoder

LATENT = STEP // 2  # pixels per side of a latent
FIRST_EDIT_AREA = 1024 * 1024  # the first editor's encoder sees its reference as large as its VAE


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
    **how: Any,
) -> Prefix:
    """The DiT's prefix of a prompt and its references.

    `images` (H, W, 3 or 4) in 0..1 of any size, for the encoder; `latents` (1, C, H / 8, W / 8), of
    the same in the size of the DiT's reference; `dtype` is what the DiT computes in; `room` is not
    needed; `how` else the encoder reads (`areas`). What `store` knows of the prompt is not read
    again; all else changes with every step.
    """
    how = reading_of(dit.config.variant) | how
    read = read_once(store, encoder, prompt, images, **how)
    return dit.prefix(read.hidden.to(dtype), read.slots, [x.to(dtype) for x in latents])


def reading_of(variant: str) -> dict[str, Any]:
    """How the encoder reads for this variant: arguments of `Encoder.encode`."""
    if variant == LAYERED:  # reads only what the prompt says of its picture
        return {"area": 0}
    return {"area": FIRST_EDIT_AREA, "numbered": False} if variant == EDIT else {}


# ---- references that the encoder sees in sizes of their own ------------------------------------


def areas_of(sides: Sequence[int]) -> dict[str, Any]:
    return {"areas": tuple(side**2 for side in sides)} if any(sides) else {}


def tokens(width: int, height: int, side: int) -> int:
    """Vision tokens of a picture, in the area of a square, or in the usual one."""
    seen = vlm_size(width, height, side**2 or AREA_VLM)
    return seen[0] * seen[1] // SLOT**2


OWN_SIZE = OwnSize(
    show=lambda given, shown, sides: list(given),
    how=areas_of,
    tokens=tokens,
    fit=lambda hidden, slots, latents: (hidden, slots),
)


def reading(dit: Loaded) -> dict[str, Any]:
    return reading_of(dit.config.variant)


def accepts(dit: Loaded, count: int) -> None:
    """Raise CheckpointError for references that this variant cannot take; there is no limit."""
    variant = dit.config.variant
    title = VARIANTS[variant]
    if variant == LAYERED and count != 1:
        raise CheckpointError(
            f"{title} takes one picture apart into layers, but was given {count}; give one "
            "reference."
        )
    if count and variant not in (*EDITORS, LAYERED):
        raise CheckpointError(
            f"the model was loaded as {title}, which paints from words only, but was given "
            f"{count} reference{'s' if count > 1 else ''}; leave out the references, or, if it is "
            f"an editor, load it with its variant: {', '.join(EDITORS)}."
        )


def channels(dit: Loaded) -> int:
    """Latent channels of the pictures that a DiT makes."""
    return dit.config.out_channels


def frames(dit: Loaded, layers: int) -> int:
    """Latents that are painted together: with layers, the whole picture comes before them."""
    return layers + 1 if dit.config.layered else 1


def check(dit: Loaded, vae: Loaded, encoder: Loaded) -> None:
    """Raise CheckpointError unless the three networks fit together."""
    belongs = "; choose the {} that was published with the diffusion model."
    if vae.config.z_dim != dit.config.out_channels:
        raise CheckpointError(
            f"{vae.checkpoint.name} makes latents of {vae.config.z_dim} channels, but "
            f"{dit.checkpoint.name} works on {dit.config.out_channels}{belongs.format('VAE')}"
        )
    if vae.config.factor != LATENT:
        raise CheckpointError(
            f"{vae.checkpoint.name} makes a latent of {vae.config.factor} x {vae.config.factor} "
            f"pixels, but {dit.checkpoint.name} needs {LATENT} x {LATENT}{belongs.format('VAE')}"
        )
    wanted = 4 if dit.config.layered else 3
    if vae.config.in_channels != wanted:
        with_alpha = "with alpha" if wanted == 4 else "without alpha"
        raise CheckpointError(
            f"{dit.checkpoint.name} needs a VAE {with_alpha}, but {vae.checkpoint.name} has "
            f"{vae.config.in_channels} channels{belongs.format('VAE')}"
        )
    if encoder.config.hidden != dit.config.context_dim:
        raise CheckpointError(
            f"{encoder.checkpoint.name} has states of {encoder.config.hidden} channels, but "
            f"{dit.checkpoint.name} reads {dit.config.context_dim}{belongs.format('text encoder')}"
        )
