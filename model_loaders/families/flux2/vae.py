"""The VAE of FLUX.2: RGB pictures to 128 channels at a sixteenth of the side, and back.

A convolutional autoencoder with 32 channels at an eighth of the side, whose latents are folded 2x2
into channels and normalised with the running statistics of a batch norm, which are in its file.
Its norms look at the whole picture, so in strips every layer keeps its whole output; what strips
save is all that a layer needs beside it.

Names and shapes are the published ones (diffusers' `AutoencoderKLFlux2`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...strips import (
    PADDING,
    SMALL,
    Write,
    attend,
    blocks,
    convolve,
    cut,
    doubled,
    joined,
    regrouped,
)

PATCH = 2  # latents per side that become channels
MEMORY = 1 << 30  # bytes of activations above which pictures are done in strips


class VAEError(ValueError):
    """A picture or latents that this VAE cannot take."""


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the network; the defaults are the published VAE."""

    channels: int = 32  # of a latent before it is folded
    in_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of every stage, finest first
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # residual blocks per stage of the encoder; the decoder has one more
    groups: int = 32  # of the norms
    quant_conv: bool = True
    post_quant_conv: bool = True
    eps: float = 1e-4  # of the latents' statistics

    def __post_init__(self) -> None:
        uneven = [w for w in (*self.widths, *self.decoder_widths) if w % self.groups]
        if uneven:
            raise VAEError(
                f"A VAE whose norms have {self.groups} groups cannot be {uneven[0]} wide; its "
                "config.json says how many they are (norm_num_groups)."
            )

    @property
    def z_dim(self) -> int:
        """Channels of the latents that the diffusion model works on."""
        return self.channels * PATCH**2

    @property
    def factor(self) -> int:
        """Pixels per latent that the diffusion model works on, along a side."""
        return PATCH * 2 ** (len(self.widths) - 1)


class GroupNorm(nn.Module):
    """Norm over groups of channels and the whole picture, then a gain and an offset per channel."""

    def __init__(self, groups: int, width: int, device=None, dtype=None) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, 1e-6)

    def activated(self, strips: Sequence[Tensor]) -> Write:
        """What writes SiLU of the same for parts of the picture that the strips make up."""
        rows = torch.cat([moments(x) for x in strips], -1).mean(-1)  # 2, B, width
        mean, square = rows.unflatten(-1, (self.groups, -1)).mean(-1, keepdim=True)
        rstd = ((square - mean * mean).clamp_min(0) + 1e-6).rsqrt()
        gain = self.weight.float().unflatten(0, (self.groups, -1)) * rstd
        offset = self.bias.float().unflatten(0, (self.groups, -1)) - mean * gain
        gain, offset = (v.flatten(1)[:, :, None, None] for v in (gain, offset))

        def write(x: Tensor, to: Tensor) -> None:
            if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
                to.copy_(F.silu(torch.addcmul(offset, x, gain)))
            else:
                F.silu(torch.addcmul(offset, x, gain, out=to), inplace=True)

        return write


def moments(x: Tensor) -> Tensor:
    """Means of x (B, C, H, W) and of its squares over each row, fp32 (2, B, C, H).

    Per row, so that they do not depend on the strip that a row is in.
    """
    width = x.shape[3]
    if x.device.type == "cpu":  # pooling is many times faster there than sums over columns
        pools = [
            torch.stack([F.avg_pool2d(v, (1, width))[..., 0] for v in (part, part.square())])
            for part in x.float().split(blocks(x), 2)
        ]
        return torch.cat(pools, -1)
    norm = torch.linalg.vector_norm(x, dim=3, dtype=torch.float32)
    return torch.stack([x.sum(3, dtype=torch.float32), norm * norm]) / width


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 twice, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, width: int, out: int, groups: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width, **kw)
        self.conv1 = ops.Conv2d(width, out, 3, padding=PADDING, **kw)
        self.norm2 = GroupNorm(groups, out, **kw)
        self.conv2 = ops.Conv2d(out, out, 3, padding=PADDING, **kw)
        self.conv_shortcut = ops.Conv2d(width, out, 1, **kw) if width != out else nn.Identity()

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Strips of a picture, which it takes out of the list -> the same strips."""
        inner, skip, outer = [], [], []
        for part, done in convolve(x, self.conv1, self.norm1.activated(x)):
            inner.append(done)
            skip.append(self.conv_shortcut(part))
            del part, done  # here and below: no name may keep rows alive
        for part, done in convolve(inner, self.conv2, self.norm2.activated(inner)):
            outer.append(done.add_(skip.pop(0)))
            del part, done
        return outer


class Attention(nn.Module):
    """Every pixel attends to every pixel, one head."""

    def __init__(self, width: int, groups: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, width, **kw)
        self.to_q = ops.Linear(width, width, **kw)
        self.to_k = ops.Linear(width, width, **kw)
        self.to_v = ops.Linear(width, width, **kw)
        self.to_out = nn.ModuleList([ops.Linear(width, width, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, 1, h * w, c)
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
        return self.to_out[0](y).view(b, h, w, c).permute(0, 3, 1, 2).add_(x)


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, groups, ops, **kw) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups, ops, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        (x,) = self.resnets[0]([x])
        (x,) = self.resnets[1]([self.attentions[0](x)])
        return x


class Resample(nn.Module):
    """Half the side by a strided convolution, or twice by repeating pixels and a convolution."""

    def __init__(self, width: int, up: bool, ops: Operations, **kw) -> None:
        super().__init__()
        self.up = up
        kind = {"padding": PADDING} if up else {"stride": 2}
        self.conv = ops.Conv2d(width, width, 3, **kind, **kw)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Strips, which it takes out of the list and must have an even height to be halved."""
        how = partial(convolve, write=doubled, scale=2) if self.up else partial(convolve, down=True)
        return [done for _, done in how(x, self.conv)]


class Stage(nn.Module):
    """Residual blocks, then another side unless this is the last stage."""

    def __init__(
        self, widths: list[int], groups: int, up: bool | None, ops: Operations, **kw
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(a, b, groups, ops, **kw) for a, b in pairwise(widths))
        if up is not None:
            name = "upsamplers" if up else "downsamplers"
            self.add_module(name, nn.ModuleList([Resample(widths[-1], up, ops, **kw)]))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for layer in self.children():
            for block in layer.children():
                x = block(x)
        return x


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 channels, H / f, W / f): mean and log variance."""

    def __init__(self, c: VAEConfig, ops: Operations, **kw) -> None:
        super().__init__()
        before = (c.widths[0], *c.widths[:-1])
        last = len(c.widths) - 1
        self.thin = min(c.in_channels, *(w / 4**i for i, w in enumerate(c.widths)))
        self.work = alive(zip(before, c.widths, strict=True))
        self.conv_in = ops.Conv2d(c.in_channels, c.widths[0], 3, padding=PADDING, **kw)
        self.down_blocks = nn.ModuleList(
            Stage([a] + [b] * c.blocks, c.groups, None if i == last else False, ops, **kw)
            for i, (a, b) in enumerate(zip(before, c.widths, strict=True))
        )
        self.mid_block = MidBlock(c.widths[-1], c.groups, ops, **kw)
        self.conv_norm_out = GroupNorm(c.groups, c.widths[-1], **kw)
        self.conv_out = ops.Conv2d(c.widths[-1], 2 * c.channels, 3, padding=PADDING, **kw)

    def forward(self, x: Tensor, strips: int) -> Tensor:
        side = 2 ** (len(self.down_blocks) - 1)
        pictures = cut(x, strips, least_rows(x, self.thin), side)
        pictures = [done for _, done in convolve(pictures, self.conv_in)]
        for stage, work in zip(self.down_blocks, self.work, strict=True):
            count = min(len(pictures), math.ceil(strips * work / max(self.work)))
            pictures = stage(regrouped(pictures, count))
        y = [self.mid_block(torch.cat(pictures, 2))]
        ((_, out),) = convolve(y, self.conv_out, self.conv_norm_out.activated(y))
        return out


class Decoder(nn.Module):
    """(B, channels, h, w) -> (B, in_channels, h f, w f)."""

    def __init__(self, c: VAEConfig, ops: Operations, **kw) -> None:
        super().__init__()
        widths = c.decoder_widths[::-1]
        before = (widths[0], *widths[:-1])
        last = len(widths) - 1
        self.thin = min(w * 4**i for i, w in enumerate(widths))
        self.work = alive(zip(before[::-1], widths[::-1], strict=True))
        self.conv_in = ops.Conv2d(c.channels, widths[0], 3, padding=1, **kw)
        self.mid_block = MidBlock(widths[0], c.groups, ops, **kw)
        self.up_blocks = nn.ModuleList(
            Stage([a] + [b] * (c.blocks + 1), c.groups, None if i == last else True, ops, **kw)
            for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.conv_norm_out = GroupNorm(c.groups, widths[-1], **kw)
        self.conv_out = ops.Conv2d(widths[-1], c.in_channels, 3, padding=PADDING, **kw)

    def forward(self, x: Tensor, strips: int) -> Tensor:
        height = x.shape[2] * 2 ** (len(self.up_blocks) - 1)
        pictures = [self.mid_block(self.conv_in(x))]
        least = least_rows(x, self.thin)
        for stage, work in zip(self.up_blocks, reversed(self.work), strict=True):
            count = math.ceil(strips * work / max(self.work))
            pictures = stage(regrouped(pictures, count, least))
            least *= 2
        norm = self.conv_norm_out.activated(pictures)
        return joined((done for _, done in convolve(pictures, self.conv_out, norm)), height)


def least_rows(x: Tensor, thin: float) -> int:
    """How few rows of x a strip may have so that all its convolutions are of the same kind."""
    return 1 + int(SMALL / (thin * x.shape[3])) if x.device.type == "cpu" and len(x) == 1 else 1


def alive(ends: Iterable[tuple[int, int]]) -> list[float]:
    """Values per pixel of the finest stage that are alive at the worst moment of each that runs
    whole; `ends` are widths of input and output, finest first. A residual block has its input, what
    conv1 reads and makes; then that, what conv2 reads, the shortcut and the result."""
    return [max(2 * a + b, 4 * b) / 4**i for i, (a, b) in enumerate(ends)]


def strips_of(strips: int | None, work: float, memory: int) -> int:
    """In how many strips to work where a whole picture takes `work` bytes; 0 is any memory."""
    if strips is not None:
        if strips < 1:
            raise VAEError(
                f"The VAE works in 1 strip or more, but was told {strips}; leave it out."
            )
        return strips
    return 1 if not memory or work <= memory else math.ceil(8 * work / memory)


class Statistics(nn.Module):
    """Mean and variance of the latents, named as a batch norm names them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))

    def forward(self, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp32 (channels, 1, 1) each."""
        mean, variance = self.running_mean.float(), self.running_var.float()
        return mean[:, None, None], (variance + eps).sqrt()[:, None, None]


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 to and from normalised latents."""

    def __init__(
        self,
        config: VAEConfig | None = None,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or VAEConfig()
        ops, kw = operations, {"device": device, "dtype": dtype}
        self.casts = ops.casts
        self.encoder, self.decoder = Encoder(c, ops, **kw), Decoder(c, ops, **kw)
        if c.quant_conv:
            self.quant_conv = ops.Conv2d(2 * c.channels, 2 * c.channels, 1, **kw)
        if c.post_quant_conv:
            self.post_quant_conv = ops.Conv2d(c.channels, c.channels, 1, **kw)
        self.bn = Statistics(c.z_dim, **kw)

    @property
    def held(self) -> int:
        """Values per pixel that are alive in however many strips."""
        finest, *wider = self.config.decoder_widths
        return max([2 * finest, *wider[:1]])

    def encode(self, pixels: Tensor, strips: int | None = None, *, memory: int = MEMORY) -> Tensor:
        """The most likely latents of pictures (B, 3, H, W): fp32 (B, z, H / f, W / f), normalised.

        `strips` and `memory`: as in `decode`. Raises VAEError.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1] != c.in_channels:
            raise VAEError(
                f"The VAE takes pictures of shape (batch, {c.in_channels}, height, width), but was "
                f"given {tuple(pixels.shape)}; a picture must come without alpha."
            )
        h, w = pixels.shape[2:]
        if h % c.factor or w % c.factor or not pixels.numel():
            raise VAEError(
                f"The VAE takes pictures whose sides are multiples of {c.factor}, but was given "
                f"{w}x{h}; resize or pad it."
            )
        x = self._layout(pixels)
        work = max(self.encoder.work) * x[:, 0].numel() * x.element_size()
        x = self.encoder(x, strips_of(strips, work, 0 if x.requires_grad else memory))
        x = (self.quant_conv(x) if c.quant_conv else x)[:, : c.channels]
        mean, deviation = self.bn(c.eps)
        return (F.pixel_unshuffle(x.float(), PATCH) - mean) / deviation

    def decode(
        self,
        latents: Tensor,
        strips: int | None = None,
        *,
        memory: int = MEMORY,
        clamp: bool = True,
    ) -> Tensor:
        """Pictures (B, 3, h f, w f) in -1..1 of normalised latents (B, z, h, w).

        `strips` is in how many horizontal strips layers run; the result is the same. By default,
        and but for training, as many as keep what layers need beside their outputs below an eighth
        of `memory` bytes, if all does not fit in it. `clamp=False` leaves values outside of -1..1.
        Raises VAEError.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[1] != c.z_dim or not latents.numel():
            raise VAEError(
                f"The VAE takes latents of shape (batch, {c.z_dim}, height, width), but was given "
                f"{tuple(latents.shape)}; use latents of the same model family."
            )
        mean, deviation = self.bn(c.eps)
        x = self._layout(F.pixel_shuffle(latents.float() * deviation + mean, PATCH))
        x = self.post_quant_conv(x) if c.post_quant_conv else x
        area = x[:, 0].numel() * (c.factor // PATCH) ** 2
        work = max(self.decoder.work) * area * x.element_size()
        pixels = self.decoder(x, strips_of(strips, work, 0 if x.requires_grad else memory))
        return pixels.clamp(-1, 1) if clamp else pixels

    def _layout(self, x: Tensor) -> Tensor:
        """x as the layers want it: channels last, which makes convolutions faster, and in the dtype
        of the weights unless they are cast."""
        dtype = x.dtype if self.casts else next(self.decoder.parameters()).dtype
        return x.to(dtype).contiguous(memory_format=torch.channels_last)
