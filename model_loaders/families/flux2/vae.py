"""The VAE of FLUX.2: RGB pictures to 128 channels at a sixteenth of the side, and back.

A convolutional autoencoder with 32 channels at an eighth of the side, whose latents are folded 2x2
into channels and normalised with the running statistics of a batch norm, which are in its file.
Its norms look at the whole picture, so it cannot run in strips.

Names and shapes are the published ones (diffusers' `AutoencoderKLFlux2`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations

PATCH = 2  # latents per side that become channels


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


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 twice, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, width: int, out: int, groups: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width, **kw)
        self.conv1 = ops.Conv2d(width, out, 3, padding=1, **kw)
        self.norm2 = GroupNorm(groups, out, **kw)
        self.conv2 = ops.Conv2d(out, out, 3, padding=1, **kw)
        self.conv_shortcut = ops.Conv2d(width, out, 1, **kw) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.conv_shortcut(x))


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
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return self.to_out[0](y).view(b, h, w, c).permute(0, 3, 1, 2).add_(x)


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, groups, ops, **kw) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups, ops, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Half the side by a strided convolution, or twice by repeating pixels and a convolution."""

    def __init__(self, width: int, up: bool, ops: Operations, **kw) -> None:
        super().__init__()
        self.up = up
        kind = {"padding": 1} if up else {"stride": 2}
        self.conv = ops.Conv2d(width, width, 3, **kind, **kw)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """Residual blocks, then another side unless this is the last stage."""

    def __init__(
        self, widths: list[int], groups: int, up: bool | None, ops: Operations, **kw
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(a, b, groups, ops, **kw) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        if up is not None:
            name = "upsamplers" if up else "downsamplers"
            self.add_module(name, nn.ModuleList([Resample(widths[-1], up, ops, **kw)]))

    def forward(self, x: Tensor) -> Tensor:
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
        self.conv_in = ops.Conv2d(c.in_channels, c.widths[0], 3, padding=1, **kw)
        self.down_blocks = nn.ModuleList(
            Stage([a] + [b] * c.blocks, c.groups, None if i == last else False, ops, **kw)
            for i, (a, b) in enumerate(zip(before, c.widths, strict=True))
        )
        self.mid_block = MidBlock(c.widths[-1], c.groups, ops, **kw)
        self.conv_norm_out = GroupNorm(c.groups, c.widths[-1], **kw)
        self.conv_out = ops.Conv2d(c.widths[-1], 2 * c.channels, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        x = self.conv_norm_out(self.mid_block(x))
        return self.conv_out(F.silu(x, inplace=True))


class Decoder(nn.Module):
    """(B, channels, h, w) -> (B, in_channels, h f, w f)."""

    def __init__(self, c: VAEConfig, ops: Operations, **kw) -> None:
        super().__init__()
        widths = c.decoder_widths[::-1]
        before = (widths[0], *widths[:-1])
        last = len(widths) - 1
        self.conv_in = ops.Conv2d(c.channels, widths[0], 3, padding=1, **kw)
        self.mid_block = MidBlock(widths[0], c.groups, ops, **kw)
        self.up_blocks = nn.ModuleList(
            Stage([a] + [b] * (c.blocks + 1), c.groups, None if i == last else True, ops, **kw)
            for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.conv_norm_out = GroupNorm(c.groups, widths[-1], **kw)
        self.conv_out = ops.Conv2d(widths[-1], c.in_channels, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


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

    runs_in_strips = False

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

    def encode(self, pixels: Tensor, strips: int | None = None) -> Tensor:
        """The most likely latents of pictures (B, 3, H, W): fp32 (B, z, H / f, W / f), normalised.

        `strips` is for callers that know no VAE in particular: this one runs whole. Raises
        VAEError.
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
        x = self.encoder(self._layout(pixels))
        x = (self.quant_conv(x) if c.quant_conv else x)[:, : c.channels]
        mean, deviation = self.bn(c.eps)
        return (F.pixel_unshuffle(x.float(), PATCH) - mean) / deviation

    def decode(self, latents: Tensor, strips: int | None = None, *, clamp: bool = True) -> Tensor:
        """Pictures (B, 3, h f, w f) in -1..1 of normalised latents (B, z, h, w).

        `strips`: as in `encode`. `clamp=False` leaves values outside of -1..1. Raises VAEError.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[1] != c.z_dim or not latents.numel():
            raise VAEError(
                f"The VAE takes latents of shape (batch, {c.z_dim}, height, width), but was given "
                f"{tuple(latents.shape)}; use latents of the same model family."
            )
        mean, deviation = self.bn(c.eps)
        x = self._layout(F.pixel_shuffle(latents.float() * deviation + mean, PATCH))
        pixels = self.decoder(self.post_quant_conv(x) if c.post_quant_conv else x)
        return pixels.clamp(-1, 1) if clamp else pixels

    def _layout(self, x: Tensor) -> Tensor:
        """x as the layers want it: channels last, which makes convolutions faster, and in the dtype
        of the weights unless they are cast."""
        dtype = x.dtype if self.casts else next(self.decoder.parameters()).dtype
        return x.to(dtype).contiguous(memory_format=torch.channels_last)
