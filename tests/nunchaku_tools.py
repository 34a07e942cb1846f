"""Layers as Nunchaku's files hold them, packed one number at a time by where each of them lies.

The places are those of mma.m16n8k64's operands and of TinyChat's kernel, written down from the
descriptions in deepcompressor (backend/nunchaku/utils.py, backend/tinychat) as plain sums, so that
nothing of our way to put them in order again is used here.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 0.171875
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
RANK = 16


def index(n: int) -> Tensor:
    return torch.arange(n)


def put(values: Tensor, places: Tensor) -> Tensor:
    """values and places (n, k) -> a flat tensor with every value in its place."""
    assert len(places.unique()) == places.numel() == int(places.max()) + 1
    out = torch.empty(places.numel(), dtype=values.dtype)
    out[places.flatten()] = values.flatten()
    return out


def words(codes: Tensor) -> Tensor:
    """4-bit codes (n,) -> bytes (n / 2,), the first in the lower half."""
    return ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).to(torch.uint8)


def pack_weight(codes: Tensor) -> Tensor:
    """Codes (n, k) -> qweight (n, k / 2): n = tile 128, pack 16, half 8, lane; k = tile 64, half
    32, lane 8, register."""
    (n, k), (i, j) = codes.shape, torch.meshgrid(*map(index, codes.shape), indexing="ij")
    place = (i // 128) * (k // 64) + j // 64
    for size, digit in ((8, i % 128 // 16), (8, i % 8), (4, j % 32 // 8), (2, i % 16 // 8),
                        (2, j % 64 // 32), (8, j % 8)):  # fmt: skip
        place = place * size + digit
    return words(put(codes.long(), place)).view(torch.int8).view(n, k // 2)


def pack_scale(scale: Tensor) -> Tensor:
    """16-bit scales (n, groups) -> (groups, n): a lane has outputs 0 1 8 9, the next 2 3 10 11."""
    (n, g), (i, j) = scale.shape, torch.meshgrid(*map(index, scale.shape), indexing="ij")
    place = (i // 128) * g + j
    for size, digit in ((8, i % 128 // 16), (4, i % 8 // 2), (2, i % 16 // 8), (2, i % 2)):
        place = place * size + digit
    return put(scale, place).view(g, n)


def pack_vector(vector: Tensor) -> Tensor:
    return pack_scale(vector[:, None]).flatten()


def pack_small_scale(scale: Tensor) -> Tensor:
    """float8 scales (n, groups of 16) -> (groups, n): a lane has outputs 0 32 64 96, four groups of
    each; the next 8 40 72 104."""
    (n, g), (i, j) = scale.shape, torch.meshgrid(*map(index, scale.shape), indexing="ij")
    place = (i // 128) * (g // 4) + j // 4
    for size, digit in ((8, i % 8), (4, i % 32 // 8), (4, i % 128 // 32), (4, j % 4)):
        place = place * size + digit
    packed = put(scale.to(torch.float8_e4m3fn).view(torch.uint8), place)
    return packed.view(torch.float8_e4m3fn).view(g, n)


def pack_branch(matrix: Tensor, down: bool) -> Tensor:
    """proj_down (rank, in) -> (in, rank), proj_up (out, rank) -> (out, rank): tiles of 16 x 16,
    those of the long side first."""
    (n, k), (i, j) = matrix.shape, torch.meshgrid(*map(index, matrix.shape), indexing="ij")
    tile = (j // 16) * (n // 16) + i // 16 if down else (i // 16) * (k // 16) + j // 16
    place = tile
    for size, digit in ((8, i % 8), (4, j % 8 // 2), (2, i % 16 // 8), (2, j % 16 // 8),
                        (2, j % 2)):  # fmt: skip
        place = place * size + digit
    return put(matrix, place).view((k, n) if down else (n, k))


def pack_awq(codes: Tensor) -> Tensor:
    """Codes 0..15 (n, k) -> qweight (n / 4, k / 2) of 32 bits: 4 outputs take turns every 64
    inputs; a 16-bit word holds inputs w, w + 8, w + 16, w + 24 of 32."""
    (n, k), (i, j) = codes.shape, torch.meshgrid(*map(index, codes.shape), indexing="ij")
    place = (i // 4) * (k // 64) + j // 64
    for size, digit in ((4, i % 4), (2, j % 64 // 32), (8, j % 8), (4, j % 32 // 8)):
        place = place * size + digit
    return words(put(codes.long(), place)).view(torch.int32).view(n // 4, k // 2)


def smoothing(width: int) -> Tensor:
    return (0.5 + torch.rand(width, generator=torch.Generator().manual_seed(width))).bfloat16()


def svdquant(
    weight: Tensor, kind: str = "int4", whole_scale: str = "wcscales"
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A layer's tensors, the weight they stand for, and its 4-bit part, which x / smooth meets."""
    smooth = smoothing(weight.shape[1])
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    up, down = (u[:, :RANK] * s[:RANK]).bfloat16(), v[:RANK].bfloat16()
    left = (weight - up.float() @ down.float()) * smooth.float()
    tensors = {
        "smooth_factor": pack_vector(smooth), "smooth_factor_orig": pack_vector(smooth),
        "proj_down": pack_branch(down, True), "proj_up": pack_branch(up, False),
    }  # fmt: skip
    if kind == "int4":
        groups = left.unflatten(1, (-1, 64))
        scale = (groups.abs().amax(dim=2) / 7).bfloat16()
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        core = (codes * scale.float()[..., None]).flatten(1)
        tensors |= {"qweight": pack_weight(codes.flatten(1)), "wscales": pack_scale(scale)}
    else:
        groups = left.unflatten(1, (-1, 16))
        outer = (left.abs().amax(dim=1, keepdim=True) / (448 * 6)).bfloat16()
        if whole_scale == "wtscale":
            outer = outer.max().expand(len(left), 1)
        micro = (groups.abs().amax(dim=2) / 6 / outer.float()).to(torch.float8_e4m3fn)
        unit = micro.float()[..., None] * outer.float()[..., None]
        levels = torch.cat((E2M1, -E2M1))
        codes = (groups[..., None] / unit[..., None] - levels).abs().argmin(dim=-1)
        core = (levels[codes] * unit).flatten(1)
        tensors |= {
            "qweight": pack_weight(codes.flatten(1)),
            "wscales": pack_small_scale(micro.float()),
            whole_scale: outer[:1, 0].clone() if whole_scale == "wtscale" else
            pack_vector(outer[:, 0].contiguous()),
        }  # fmt: skip
    return tensors, core / smooth.float() + up.float() @ down.float(), core


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors and the weight they stand for."""
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale, zero = ((high - low) / 15).bfloat16(), low.bfloat16()
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    whole = (codes * scale.float()[..., None] + zero.float()[..., None]).flatten(1)
    tensors = {
        "qweight": pack_awq(codes.flatten(1)), "wscales": scale.t().contiguous(),
        "wzeros": zero.t().contiguous(),
    }  # fmt: skip
    return tensors, whole
