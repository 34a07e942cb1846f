"""The VAE of Qwen-Image: pictures to 16 channels at an eighth of the side, and back.

It is Wan 2.1's causal video VAE. On the one frame that a picture is, no layer that mixes frames
runs: two of the three temporal taps of a convolution multiply zeros, and the halving and doubling
of time begin with the second frame. Qwen-Image-Layered has one with an alpha channel.

Names and shapes are the published ones (diffusers' `AutoencoderKLQwenImage`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...strips import Stage, Whole
from ...wan_vae import MidBlock, PixelNorm, Resample, ResBlock, Run, VAEError, WanVAE
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
        mult, halvings = self.dim_mult, len(self.temporal_downsample)
        if halvings != len(mult) - 1:
            raise VAEError(
                f"A VAE of {len(mult)} stages needs {len(mult) - 1} values of temporal_downsample, "
                f"but was given {halvings}."
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise VAEError(
                f"A VAE of {self.z_dim} latent channels needs as many values of latents_mean and "
                f"latents_std, but was given {len(self.latents_mean)} and {len(self.latents_std)}."
            )
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

    def __call__(self, x: Tensor, layers: Whole) -> Tensor:
        for layer in self.layers:
            x = layer(x, layers)
        return x

    def stage(self) -> Stage:
        halves = isinstance(self.layers[-1], Resample)
        lag = 2 * len(self.layers) + 2
        work = self.dim + 3 * self.out_dim
        return Stage(self, 0.5 if halves else 1.0, lag, work, min(self.dim, self.out_dim))


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 z_dim, H / f, W / f): mean and log variance."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = ops.Conv2d(config.in_channels, widths[0], 3, padding=1, **kw)
        blocks: list[nn.Module] = []  # published as one flat list
        self.cuts: list[DownStage] = []
        for i, (dim, out_dim) in enumerate(pairwise(widths)):
            ins = [dim] + [out_dim] * (config.num_res_blocks - 1)
            part: list[nn.Module] = [ResBlock(d, out_dim, ops, **kw) for d in ins]
            if i < len(config.dim_mult) - 1:
                temporal = config.temporal_downsample[i]
                part.append(Resample(out_dim, out_dim, False, temporal, ops, **kw))
            self.cuts.append(DownStage(part, dim, out_dim))
            blocks += part
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1], ops, **kw)
        self.norm_out = PixelNorm(widths[-1], 3, **kw)
        self.conv_out = ops.Conv2d(widths[-1], config.z_dim * 2, 3, padding=1, **kw)
        self.in_channels = config.in_channels

    def stages(self) -> list[Stage]:
        """What runs before the attention, and can run in strips."""
        first, *stages = (cut.stage() for cut in self.cuts)
        thin = min(first.thin, self.in_channels)
        return [replace(first, run=self._start, lag=first.lag + 1, thin=thin), *stages]

    def _start(self, x: Tensor, layers: Whole) -> Tensor:
        return self.cuts[0](layers.conv(self.conv_in, x), layers)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        x = self.mid_block(run(self.stages(), x))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


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

    def forward(self, x: Tensor, layers: Whole) -> Tensor:
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


class Decoder(nn.Module):
    """(B, z_dim, h, w) -> (B, in_channels, h f, w f)."""

    def __init__(self, config: VAEConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in config.dim_mult[::-1]]
        stages, temporal = len(widths), [*config.temporal_downsample[::-1], False]
        ins = [widths[0], *(width // 2 for width in widths[:-1])]
        self.conv_in = ops.Conv2d(config.z_dim, widths[0], 3, padding=1, **kw)
        self.mid_block = MidBlock(widths[0], ops, **kw)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                ins[i], widths[i], i < stages - 1, temporal[i], config.num_res_blocks, ops, **kw
            )
            for i in range(stages)
        )
        self.norm_out = PixelNorm(widths[-1], 3, **kw)
        self.conv_out = ops.Conv2d(widths[-1], config.in_channels, 3, padding=1, **kw)

    def stages(self) -> list[Stage]:
        """What runs after the attention, and can run in strips."""
        *stages, last = (block.stage() for block in cast("Iterable[UpBlock]", self.up_blocks))
        return [*stages, replace(last, run=self._finish, lag=last.lag + 1)]

    def _finish(self, x: Tensor, layers: Whole) -> Tensor:
        x = self.up_blocks[-1](x, layers)
        return layers.conv(self.conv_out, F.silu(self.norm_out(x), inplace=True))

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return run(self.stages(), self.mid_block(self.conv_in(x)))


class VAE(WanVAE):
    """Pictures (B, 3, H, W) in -1..1, or with alpha (B, 4, H, W), to and from latents."""

    def __init__(
        self,
        config: VAEConfig | None = None,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config or VAEConfig(), Encoder, Decoder, operations, device, dtype)
