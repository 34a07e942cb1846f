"""What the VAEs of the Wan family share: a causal video VAE that only ever sees one frame.

What remains of it is 2-D: of a causal 3-D convolution's temporal taps all but the last multiply
frames of zeros, so only the last one is loaded, and every convolution is 3x3 or 1x1 on a picture.
A family adds its stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.operations import TORCH, Operations
from .strips import PADDING, Layers, Stage, attend, run_in_strips, run_whole, work_of

Run = Callable[[list[Stage], Tensor], Tensor]
MEMORY = 1 << 30  # bytes of activations above which pictures are done in strips


class VAEError(ValueError):
    """A picture or latents that this VAE cannot take."""


class PixelNorm(nn.Module):
    """RMS norm over the channels of every pixel, in fp32, then a learned gain per channel."""

    def __init__(self, dim: int, ranks: int, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ranks, device=device, dtype=dtype))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, dim, H, W) -> the same shape and dtype, in `out` if that is given."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = x.shape[1] ** 0.5 / length.clamp_min(1e-12)
        gamma = self.gamma.view(-1, 1, 1).to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad):
            y = (x * scale).to(x.dtype) * gamma
            return y if out is None else out.copy_(y)
        return torch.mul(x, scale, out=torch.empty_like(x) if out is None else out).mul_(gamma)

    def activated(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """SiLU of the same."""
        return F.silu(self(x, out), inplace=True)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 twice, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, dim: int, out_dim: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm1 = PixelNorm(dim, 3, **kw)
        self.conv1 = ops.Conv2d(dim, out_dim, 3, padding=PADDING, **kw)
        self.norm2 = PixelNorm(out_dim, 3, **kw)
        self.conv2 = ops.Conv2d(out_dim, out_dim, 3, padding=PADDING, **kw)
        self.conv_shortcut = ops.Conv2d(dim, out_dim, 1, **kw) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        y = layers.conv(self.conv1, x, self.norm1.activated)
        y = layers.conv(self.conv2, y, self.norm2.activated)
        # A convolution's backward does not need its output, so adding in place is safe in training.
        return layers.join(self, y, self.conv_shortcut(x))


class Attention(nn.Module):
    """Every pixel attends to every pixel, one head."""

    def __init__(self, dim: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm = PixelNorm(dim, 2, **kw)
        self.to_qkv = ops.Conv2d(dim, dim * 3, 1, **kw)
        self.proj = ops.Conv2d(dim, dim, 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c)
        y = attend(*qkv.chunk(3, dim=3))
        return self.proj(y.view(b, h, w, c).permute(0, 3, 1, 2)).add_(x)


class MidBlock(nn.Module):
    def __init__(self, dim: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim, dim, ops, **kw) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(dim, ops, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        layers = Layers()
        return self.resnets[1](self.attentions[0](self.resnets[0](x, layers)), layers)


class Resample(nn.Module):
    """Half or twice the side, by a strided convolution or a nearest upsampling with one after it.

    `time_conv` mixes frames and never runs on a picture; it is here because the files have it.
    """

    def __init__(
        self, dim: int, out_dim: int, up: bool, temporal: bool, ops: Operations, **kw
    ) -> None:
        super().__init__()
        self.up = up
        kind = {"padding": PADDING} if up else {"stride": 2}
        # Published as the second layer, after padding or upsampling, which have no weights.
        self.resample = nn.ModuleDict({"1": ops.Conv2d(dim, out_dim, 3, **kind, **kw)})
        if temporal:
            self.time_conv = ops.Conv2d(dim, dim * 2 if up else dim, 1, **kw)

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        conv = self.resample["1"]
        return layers.up(conv, x) if self.up else layers.down(conv, x)


class DownPath(nn.Module):
    """An encoder: (B, channels, H, W) -> (B, 2 z_dim, H / f, W / f), mean and log variance.

    `blocks` are published as one list; `cuts` are the parts of it that run as stages, each with a
    method `stage`, by default every block.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], z_dim: int, blocks: Iterable[nn.Module],
        ops: Operations, **kw: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = channels
        self.conv_in = ops.Conv2d(channels, widths[0], 3, padding=PADDING, **kw)
        self.down_blocks = nn.ModuleList(blocks)
        self.cuts: list[Any] = list(self.down_blocks)
        self.mid_block = MidBlock(widths[-1], ops, **kw)
        self.norm_out = PixelNorm(widths[-1], 3, **kw)
        self.conv_out = ops.Conv2d(widths[-1], z_dim * 2, 3, padding=1, **kw)

    def stages(self) -> list[Stage]:
        """What runs before the attention, and can run in strips."""
        first, *stages = (cut.stage() for cut in self.cuts)
        thin = min(first.thin, self.channels)
        return [replace(first, run=self._start, lag=first.lag + 1, thin=thin), *stages]

    def _start(self, x: Tensor, layers: Layers) -> Tensor:
        return self.cuts[0](layers.conv(self.conv_in, x), layers)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        x = self.mid_block(run(self.stages(), x))
        return self.conv_out(self.norm_out.activated(x))


class UpPath(nn.Module):
    """A decoder: (B, z_dim, h, w) -> (B, channels, h f, w f)."""

    def __init__(
        self, channels: int, widths: Sequence[int], z_dim: int, blocks: Iterable[nn.Module],
        ops: Operations, **kw: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = ops.Conv2d(z_dim, widths[0], 3, padding=1, **kw)
        self.mid_block = MidBlock(widths[0], ops, **kw)
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = PixelNorm(widths[-1], 3, **kw)
        self.conv_out = ops.Conv2d(widths[-1], channels, 3, padding=PADDING, **kw)

    def stages(self) -> list[Stage]:
        """What runs after the attention, and can run in strips."""
        *stages, last = (block.stage() for block in cast("Iterable[Any]", self.up_blocks))
        return [*stages, replace(last, run=self._finish, lag=last.lag + 1)]

    def _finish(self, x: Tensor, layers: Layers) -> Tensor:
        x = self.up_blocks[-1](x, layers)
        return layers.conv(self.conv_out, x, self.norm_out.activated)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return run(self.stages(), self.mid_block(self.conv_in(x)))


def check_lengths(config: Any) -> None:
    """That a config has values for all of its stages and latents. Raises VAEError."""
    stages, halvings = len(config.dim_mult), len(config.temporal_downsample)
    if halvings != stages - 1:
        raise VAEError(
            f"A VAE of {stages} stages needs {stages - 1} values of temporal_downsample, "
            f"but was given {halvings}."
        )
    if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        raise VAEError(
            f"A VAE of {config.z_dim} latent channels needs as many values of latents_mean and "
            f"latents_std, but was given {len(config.latents_mean)} and {len(config.latents_std)}."
        )


def fold(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C p p, H / p, W / p); within a channel x runs before y."""
    return F.pixel_unshuffle(x.mT, patch).mT if patch > 1 else x


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    return F.pixel_shuffle(x.mT, patch).mT if patch > 1 else x


class WanVAE(nn.Module):
    """Pictures (B, 3 or 4, H, W) in -1..1, alpha last, to and from normalised latents.

    `config` has in_channels, z_dim, factor (pixels per latent), patch (side of the pixel blocks
    that are folded into channels first), latents_mean and latents_std. A family says what its
    `Config`, `Encoder` and `Decoder` are: networks of stages, which are run whole or in strips.
    """

    Config: ClassVar[type[Any]]
    Encoder: ClassVar[type[Any]]
    Decoder: ClassVar[type[Any]]

    def __init__(
        self,
        config: Any = None,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = type(self)
        self.config = config = config or kind.Config()
        kw = {"device": device, "dtype": dtype}
        self.casts = operations.casts
        z = config.z_dim
        self.encoder = kind.Encoder(config, operations, **kw)
        self.quant_conv = operations.Conv2d(z * 2, z * 2, 1, **kw)
        self.post_quant_conv = operations.Conv2d(z, z, 1, **kw)
        self.decoder = kind.Decoder(config, operations, **kw)

    def encode(self, pixels: Tensor, strips: int | None = None, *, memory: int = MEMORY) -> Tensor:
        """The most likely latents of pictures (B, C, H, W): fp32 (B, z, H / f, W / f), normalised.

        `strips` and `memory`: as in `decode`. Raises VAEError.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1] != c.in_channels:
            raise VAEError(
                f"The VAE takes pictures of shape (batch, {c.in_channels}, height, width), but was "
                f"given {tuple(pixels.shape)}; a picture without alpha needs one (1 is opaque)."
            )
        h, w = pixels.shape[2:]
        if h % c.factor or w % c.factor or not pixels.numel():
            raise VAEError(
                f"The VAE takes pictures whose sides are multiples of {c.factor}, but was given "
                f"{w}x{h}; resize or crop it."
            )
        run = _runner(strips, memory)
        x = self.quant_conv(self.encoder(self._layout(fold(pixels, c.patch)), run))
        mean, std = self._statistics(x.device)
        return (x[:, : c.z_dim].float() - mean) / std

    def decode(
        self,
        latents: Tensor,
        strips: int | None = None,
        *,
        memory: int = MEMORY,
        clamp: bool = True,
    ) -> Tensor:
        """Pictures (B, C, h f, w f) in -1..1 of normalised latents (B, z, h, w).

        `strips` is in how many horizontal strips the large layers run; the result is the same. By
        default as few as keep activations below about `memory` bytes, and one while training.
        `clamp=False` leaves values outside of -1..1 and their gradients. Raises VAEError.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[1] != c.z_dim or not latents.numel():
            raise VAEError(
                f"The VAE takes latents of shape (batch, {c.z_dim}, height, width), but was given "
                f"{tuple(latents.shape)}; use latents of the same model family."
            )
        run = _runner(strips, memory)
        mean, std = self._statistics(latents.device)
        x = self._layout(latents.float() * std + mean)
        pixels = unfold(self.decoder(self.post_quant_conv(x), run), c.patch)
        return pixels.clamp(-1, 1) if clamp else pixels

    def _layout(self, x: Tensor) -> Tensor:
        """x as the layers want it: channels last, which makes norms and convolutions faster and
        these independent of the height; and in the dtype of the weights unless they are cast."""
        dtype = x.dtype if self.casts else next(self.quant_conv.parameters()).dtype
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, fp32 (z, 1, 1) each."""
        values = [self.config.latents_mean, self.config.latents_std]
        mean, std = torch.tensor(values, device=device)[..., None, None]
        return mean, std


def _runner(strips: int | None, memory: int) -> Run:
    """How to run stages: in this many strips, or in as few as the memory allows."""
    if strips is not None and strips < 1:
        raise VAEError(f"The VAE works in 1 strip or more, but was told {strips}; leave it out.")

    def run(stages: list[Stage], x: Tensor) -> Tensor:
        count = strips
        if count is None:
            size = work_of(stages, x) * x.element_size()
            # The work on a strip, and more than as much again that waits between the stages.
            count = 1 if size <= memory or x.requires_grad else -(-5 * size // (2 * memory))
        return run_whole(stages, x) if count == 1 else run_in_strips(stages, x, count)

    return run
