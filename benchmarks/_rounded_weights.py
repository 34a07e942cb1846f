"""Weights as others' tools store them, by rounding alone: a layout, and its bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant.encode import WAYS, encode, possible
from ..quant.floats import tiled
from ..quant.layouts import Layout, Parts, Plain, layout_of

GROUP = 64  # weights in a group of plain rounding
RANK = 2  # of SVDQuant's branch, in proportion to the published ones (32 of 3,072)
Store = Callable[[Tensor], tuple[Layout, float]]


def by_way(name: str) -> Store:
    """As `encode` stores it without having seen any input: scales searched, numbers rounded."""

    def store(weight: Tensor) -> tuple[Layout, float]:
        way, shape = WAYS[name], _shape(weight)
        made = encode(way if possible(way, shape) else WAYS["int8"], weight)
        return layout_of(
            made.format, Parts(made.tensors, shape, settings=made.settings)
        ), made.bytes

    return store


def by_gguf(kind: str) -> Store:
    def store(weight: Tensor) -> tuple[Layout, float]:
        import gguf

        data = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        tensors = {"weight": torch.from_numpy(data)}
        parts = Parts(tensors, _shape(weight), settings={"type": kind})
        return layout_of("gguf", parts), data.nbytes

    return store


def float8(weight: Tensor) -> tuple[Layout, float]:
    scale = weight.abs().max() / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return layout_of("float8_e4m3fn", Parts(tensors, _shape(weight))), weight.numel()


def mxfp8(weight: Tensor) -> tuple[Layout, float]:
    groups = weight.unflatten(1, (-1, 32))
    power = groups.abs().amax(dim=2).clamp_min(1e-30).log2().floor() - 8  # e4m3fn ends at 1.75 2^8
    codes = (groups / power.exp2()[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": codes.flatten(1), "weight_scale": tiled((power + 127).to(torch.uint8))}
    return layout_of("mxfp8", Parts(tensors, _shape(weight))), weight.numel() * 33 / 32


def svdquant(weight: Tensor) -> tuple[Layout, float]:
    """As SVDQuant's int4 stores it, written out: its tiles do not fit a model this small."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    branch = (u[:, :RANK] * s[:RANK]).bfloat16().float() @ v[:RANK].bfloat16().float()
    rest, size = rounded(4)(weight - branch)
    return Plain(rest.weight() + branch), size + 2 * RANK * sum(weight.shape)


def nf4(weight: Tensor) -> tuple[Layout, float]:
    import bitsandbytes.functional as library

    codes, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    tensors = {"weight": codes, "absmax": state.absmax, "quant_map": state.code}
    made = layout_of("nf4", Parts(tensors, _shape(weight), settings={"blocksize": 64}))
    return made, codes.nbytes + state.absmax.nbytes


def rounded(bits: int) -> Store:
    """To nearest, a 16-bit scale for each group."""

    def store(weight: Tensor) -> tuple[Layout, float]:
        groups = weight.unflatten(1, (-1, min(GROUP, weight.shape[1])))
        top = 2 ** (bits - 1) - 1
        scale = (groups.abs().amax(dim=2, keepdim=True) / top).half().float().clamp_min(1e-12)
        nearest = (groups / scale).round().clamp(-top - 1, top) * scale
        return Plain(nearest.flatten(1)), weight.numel() * bits / 8 + scale.numel() * 2

    return store


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


# Rows of the table: who rounds is said where it is not this benchmark.
STORES: dict[str, Store] = {
    **{f"rounded, groups of 64, {b + 0.25} bits": rounded(b) for b in (4, 5, 6, 8)},
    "NF4, blocks of 64 (bitsandbytes)": nf4,
    "GGUF Q4_0 (gguf)": by_gguf("Q4_0"),
    "GGUF Q5_0 (gguf; Q4_K's place: rows are no multiple of 256)": by_gguf("Q5_0"),
    "GGUF Q8_0 (gguf)": by_gguf("Q8_0"),
    "float8_e4m3fn, one scale": float8,
    "mxfp8": mxfp8,
    "int8_tensorwise, rows": by_way("int8"),
    "int8_tensorwise, rows, ConvRot": by_way("int8 rotated"),
    "asym_w4a8_int8 of 6 bits": by_way("6 bits"),
    "asym_w4a8_int8": by_way("4 bits in groups"),
    "convrot_w4a4": by_way("4 bits"),
    "nvfp4": by_way("nvfp4 smoothed"),
    "SVDQuant int4, by SVD alone": svdquant,
}
