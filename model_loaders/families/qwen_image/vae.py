"""The VAE of Qwen-Image: pictures to 16 channels at an eighth of the side, and back.

It is Wan 2.1's causal video VAE. On the one frame that a picture is, no layer that mixes frames
runs: two of the three temporal taps of a convolution multiply zeros, and the halving and doubling
of time begin with the second frame. Qwen-Image-Layered has one with an alpha channel.

Names and shapes are the published ones (diffusers' `AutoencoderKLQwenImage`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ....quant.operations import Operations
from ...strips import Layers, Stage
from ...wan_vae import DownPath, Resample, ResBlock, UpPath, VAEError, WanVAE, check_lengths
from .configs import LATENTS_MEAN, LATENTS_STD


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the network; the defaults are the published VAE."""

    z_dim: int = 16
    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of every stage, finest first
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # stages that halve time
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    in_channels: int = 3
    patch: int = 1

    def __post_init__(self) -> None:
        check_lengths(self)
        mult = self.dim_mult
        if any(self.base_dim * m % 2 for m in mult):
            raise VAEError(f"A VAE's widths must be even; given are {self.base_dim} x {mult}.")

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.dim_mult) - 1)


class DownStage:
    """Residual blocks, then half the side unless this is the last stage; layers, not a module."""

    def __init__(self, layers: list[nn.Module], dim: int, out_dim: int) -> None:
        self.layers, self.dim, self.out_dim = layers, dim, out_dim

    def __call__(self, x: Tensor, layers: Layers) -> Tensor:
        for layer in self.layers:
            x = layer(x, layers)
        return x

    def stage(self) -> Stage:
        halves = isinstance(self.layers[-1], Resample)
        lag = 2 * len(self.layers) + 2
        work = self.dim + 3 * self.out_dim
        return Stage(self, 0.5 if halves else 1.0, lag, work, min(self.dim, self.out_dim))


class Encoder(DownPath):
    """(B, in_channels, H, W) -> (B, 2 z_dim, H / f, W / f): mean and log variance."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw: Any) -> None:
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        cuts: list[DownStage] = []
        for i, (dim, out_dim) in enumerate(pairwise(widths)):
            ins = [dim] + [out_dim] * (config.num_res_blocks - 1)
            part: list[nn.Module] = [ResBlock(d, out_dim, ops, **kw) for d in ins]
            if i < len(config.dim_mult) - 1:
                temporal = config.temporal_downsample[i]
                part.append(Resample(out_dim, out_dim, False, temporal, ops, **kw))
            cuts.append(DownStage(part, dim, out_dim))
        flat = [layer for cut in cuts for layer in cut.layers]
        super().__init__(config.in_channels, widths, config.z_dim, flat, ops, **kw)
        self.cuts = cuts


class UpBlock(nn.Module):
    """Residual blocks, then twice the side at half the width unless this is the last stage."""

    def __init__(
        self, dim: int, out_dim: int, up: bool, temporal: bool, blocks: int, ops: Operations,
        **kw: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        widths = [dim] + [out_dim] * (blocks + 1)
        self.resnets = nn.ModuleList(ResBlock(a, b, ops, **kw) for a, b in pairwise(widths))
        if up:
            half = Resample(out_dim, out_dim // 2, True, temporal, ops, **kw)
            self.upsamplers = nn.ModuleList([half])
        else:
            self.upsamplers = None

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        for block in self.resnets:
            x = block(x, layers)
        return x if self.upsamplers is None else self.upsamplers[0](x, layers)

    def stage(self) -> Stage:
        lag, thin = 2 * len(self.resnets) + 1, min(self.dim, self.out_dim)
        work = max(2 * self.dim + self.out_dim, self.dim + 3 * self.out_dim)
        if self.upsamplers is None:
            return Stage(self, 1.0, lag, work, thin)
        # The upsampled picture before its convolution, and half as much after it.
        return Stage(self, 2.0, lag, max(work, 7 * self.out_dim), thin)


class Decoder(UpPath):
    """(B, z_dim, h, w) -> (B, in_channels, h f, w f)."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw: Any) -> None:
        widths = [config.base_dim * m for m in config.dim_mult[::-1]]
        ins = [widths[0], *(width // 2 for width in widths[:-1])]
        up = [True] * (len(widths) - 1) + [False]
        temporal = [*config.temporal_downsample[::-1], False]
        blocks = (
            UpBlock(*stage, config.num_res_blocks, ops, **kw)
            for stage in zip(ins, widths, up, temporal, strict=True)
        )
        super().__init__(config.in_channels, widths, config.z_dim, blocks, ops, **kw)


class VAE(WanVAE):
    """Pictures (B, 3, H, W) in -1..1, or with alpha (B, 4, H, W), to and from latents."""

    Config, Encoder, Decoder = VAEConfig, Encoder, Decoder
