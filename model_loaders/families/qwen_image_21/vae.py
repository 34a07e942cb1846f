"""The VAE of Qwen-Image-2.1: RGBA pictures to 64 channels at a sixteenth of the side, and back.

It is a causal video VAE (Wan 2.2) that only ever sees one frame, so what remains is 2-D: every
convolution is 3x3 or 1x1 on a picture, and time survives in two places. On the way down, the
averaging shortcut of a stage that also halves time averages over a frame of zeros in front of
ours; on the way up, the duplicating shortcut keeps the last of the two frames that it makes.

Names and shapes are the published ones (diffusers' `AutoencoderKLQwenImage21`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ....quant.operations import Operations
from ...strips import Layers, Stage
from ...wan_vae import DownPath, Resample, ResBlock, UpPath, VAEError, WanVAE, check_lengths
from .configs import LATENTS_MEAN, LATENTS_STD


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the network; the defaults are the published VAE."""

    z_dim: int = 64
    base_dim: int = 96
    decoder_base_dim: int = 144
    dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)  # channels of every stage, finest first
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True, True)  # stages that halve time
    patch_size: int | None = None  # side of the pixel blocks that are folded into channels first
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    in_channels: int = 4

    def __post_init__(self) -> None:
        check_lengths(self)
        mult, halvings = self.dim_mult, len(self.temporal_downsample)
        for i, (a, b) in enumerate(zip((1, *mult), mult, strict=False)):
            if max(a, b) % min(a, b) or b // a not in ((0, 1, 2, 4) if i < halvings else (0, 1)):
                raise VAEError(
                    f"A VAE with dim_mult {mult} has no shortcut from {a} to {b}: every stage must "
                    "be 1, 2 or 4 times as wide as the one before it, the last one no wider."
                )

    @property
    def patch(self) -> int:
        return self.patch_size or 1

    @property
    def folded(self) -> int:
        """Channels of a picture when blocks of patch x patch pixels have become channels."""
        return self.in_channels * self.patch**2

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return self.patch * 2 ** (len(self.dim_mult) - 1)


def add_averages(y: Tensor, x: Tensor, side: int, frames: int) -> None:
    """The encoder's shortcut, added to y in place: side x side pixels and `frames` frames become
    channels, and neighbours are averaged until y's channels are left.

    y (B, D, H / side, W / side), x (B, C, H, W). Ours is the last frame; those before are zero.
    """
    slots = frames * side**2  # of a channel, in this order: frame, row, column
    split, merge = max(y.shape[1] // x.shape[1], 1), max(x.shape[1] // y.shape[1], 1)
    share = split / (slots * merge)
    for row in range(side):
        for column in range(side):
            slot = slots - side**2 + row * side + column
            target = y[:, slot * split // slots :: split]
            for channel in range(merge):
                target.add_(x[:, channel::merge, row::side, column::side], alpha=share)


def add_duplicates(y: Tensor, x: Tensor, frames: int) -> None:
    """The decoder's shortcut, added to y in place, turns that round: channels are repeated until
    they fill 2 x 2 pixels in each of `frames` frames, of which the last is kept.

    y (B, D, 2 H, 2 W), x (B, C, H, W).
    """
    slots = frames * 4
    if x.shape[1] < y.shape[1]:
        x = x.repeat_interleave(y.shape[1] // x.shape[1], dim=1)
    merge = x.shape[1] // y.shape[1]
    for row in range(2):
        for column in range(2):
            slot = slots - 4 + row * 2 + column
            y[:, :, row::2, column::2].add_(x[:, slot * merge // slots :: merge])


class DownBlock(nn.Module):
    """Residual blocks, then half the side unless this is the last stage."""

    def __init__(
        self, dim: int, out_dim: int, down: bool, temporal: bool, blocks: int, ops: Operations, **kw
    ) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.add = partial(add_averages, side=1 + down, frames=1 + temporal)
        widths = [dim] + [out_dim] * blocks
        self.resnets = nn.ModuleList(
            ResBlock(a, b, ops, **kw) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.downsampler = Resample(out_dim, out_dim, False, temporal, ops, **kw) if down else None

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, layers)
        if self.downsampler is not None:
            y = self.downsampler(y, layers)
        return layers.join(self, y, x, self.add)

    def stage(self) -> Stage:
        lag = 2 * len(self.resnets) + 2
        scale = 1.0 if self.downsampler is None else 0.5
        return Stage(self, scale, lag, self.dim + 3 * self.out_dim, min(self.dim, self.out_dim))


class UpBlock(nn.Module):
    """Residual blocks, then twice the side unless this is the last stage."""

    def __init__(
        self, dim: int, out_dim: int, up: bool, temporal: bool, blocks: int, ops: Operations, **kw
    ) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.add = partial(add_duplicates, frames=1 + temporal)
        widths = [dim] + [out_dim] * (blocks + 1)
        self.resnets = nn.ModuleList(
            ResBlock(a, b, ops, **kw) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.upsampler = Resample(out_dim, out_dim, True, temporal, ops, **kw) if up else None

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, layers)
        if self.upsampler is None:
            return y
        return layers.join(self, self.upsampler(y, layers), x, self.add)

    def stage(self) -> Stage:
        lag, thin = 2 * len(self.resnets) + 1, min(self.dim, self.out_dim)
        work = max(2 * self.dim + self.out_dim, self.dim + 3 * self.out_dim)
        if self.upsampler is None:
            return Stage(self, 1.0, lag, work, thin)
        # The upsampled picture, once before its convolution and once after.
        return Stage(self, 2.0, lag, max(work, self.dim + 9 * self.out_dim), thin)


class Encoder(DownPath):
    """(B, in_channels, H, W) -> (B, 2 z_dim, H / f, W / f): mean and log variance."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw) -> None:
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        down = [True] * (len(config.dim_mult) - 1) + [False]
        temporal = [*config.temporal_downsample, False]
        blocks = (
            DownBlock(*stage, config.num_res_blocks, ops, **kw)
            for stage in zip(widths[:-1], widths[1:], down, temporal, strict=True)
        )
        super().__init__(config.folded, widths, config.z_dim, blocks, ops, **kw)


class Decoder(UpPath):
    """(B, z_dim, h, w) -> (B, in_channels, h f, w f)."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw) -> None:
        mult = config.dim_mult[::-1]
        widths = [config.decoder_base_dim * m for m in (mult[0], *mult)]
        up = [True] * (len(mult) - 1) + [False]
        temporal = [*config.temporal_downsample[::-1], False]
        blocks = (
            UpBlock(*stage, config.num_res_blocks, ops, **kw)
            for stage in zip(widths[:-1], widths[1:], up, temporal, strict=True)
        )
        super().__init__(config.folded, widths, config.z_dim, blocks, ops, **kw)


class VAE(WanVAE):
    """Pictures (B, 4, H, W) in -1..1, alpha last, to and from normalised latents."""

    Config, Encoder, Decoder = VAEConfig, Encoder, Decoder
