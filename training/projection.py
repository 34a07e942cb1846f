"""The embedded VAE's encoder as the one matrix that it is: a projection of 16 x 16 RGBA patches.

The first 64 principal components are a good f16 encoder from the first second, and they never
change, so the DiT can train on their latents while the decoder (`autoencoder.py`) still learns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model_loaders.load import load_vae
from .world import render, sample_scene

CHANNELS, PATCH = 64, 16
COMPRESSION = (
    0.5  # latents are divided by std ** COMPRESSION: coarse channels stay louder than fine ones
)


def pictures(rng: np.random.Generator, count: int, size: int = 128) -> Tensor:
    """Random pictures of the world, (count, 4, size, size) in -1..1."""
    images = np.stack([render(sample_scene(rng), size) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches(pixels: Tensor) -> Tensor:
    """Pixels (B, 4, H, W) -> (tokens, 1024) in the channel order of the VAE's own patching."""
    b, c, h, w = pixels.shape
    x = pixels.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 5, 3).reshape(-1, c * PATCH * PATCH)


def principal_components(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (1024,), components (64, 1024) and standard deviations (64,) of all patches."""
    x = patches(pixels).double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    order = values.argsort(descending=True)[:CHANNELS]
    return mean.float(), vectors[:, order].T.float(), values[order].sqrt().float()


class Projection:
    """The encoder as the one matrix that it is; the trainer's short cut to latents.

    A run keeps its own; a run without one takes over that of `exported`, a VAE file of ours, so
    that its latents stay what the exported DiT knows; else components are computed.
    """

    def __init__(self, folder: Path, exported: Path | None = None) -> None:
        path = folder / "projection.pt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            pixels = pictures(np.random.default_rng(1), 5000)
            if exported is not None and exported.exists():
                torch.save(_written_in(exported, pixels), path)
            else:
                torch.save(principal_components(pixels), path)
        self.mean, self.components, self.std = torch.load(path, weights_only=True)
        scale = self.std**COMPRESSION
        self.scale = scale * (self.std / scale).max() / 2.0  # the loudest channel has deviation 2

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 4, H, W) in -1..1 -> normalised latents (B, 64, H / 16, W / 16)."""
        b, _, h, w = pixels.shape
        z = (patches(pixels) - self.mean) @ (self.components / self.scale[:, None]).T
        return z.reshape(b, h // PATCH, w // PATCH, CHANNELS).permute(0, 3, 1, 2)

    def colours(self) -> tuple[Tensor, Tensor]:
        """Factors (64, 3) and bias (3,) that turn a normalised latent into its mean RGB, -1..1."""
        means = self.components.unflatten(1, (4, -1))[:, :3].mean(-1)
        return means * self.scale[:, None], self.mean.unflatten(0, (4, -1))[:3].mean(-1)


def _written_in(exported: Path, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, components and deviations as `autoencoder.linear_vae` wrote them into a VAE's encoder.

    Its bias fixes the mean within the components only; the rest is that of `pixels`.
    """
    vae = load_vae(exported).module
    layer, scale = vae.encoder.conv_in, torch.tensor(vae.config.latents_std)
    components = layer.weight[:CHANNELS, :, 1, 1].float()
    mean = patches(pixels).mean(0)
    missing = -layer.bias[:CHANNELS].float() - components @ mean
    mean = mean + torch.linalg.solve(components @ components.T, missing) @ components
    loudest = 2 * scale.max()  # `Projection.scale` solved for the deviation
    return mean, components, (2 * scale / loudest ** (1 - COMPRESSION)) ** (1 / COMPRESSION)
