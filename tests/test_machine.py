"""Which product each format gets on which machine, row by row, and those products' numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.load import automatic, load_dit
from seedling.quant import kernels
from seedling.quant.floats import tiled
from seedling.quant.layouts import Layout, Parts, layout_of, layouts
from seedling.quant.linear import Buffer, QuantizedLinear
from seedling.quant.machine import (
    FUNCTIONS,
    KITCHEN,
    NO_FLOAT8,
    RULES,
    SIX,
    Machine,
    MachineError,
    choose,
    has_kernel,
    kitchen_functions,
    machine_of,
)

TORCH = frozenset(("torch._int_mm", "torch._scaled_mm"))
ALL = TORCH | {KITCHEN + name for name in FUNCTIONS} | {SIX}
SHAPE = (4096, 12288)
FORMATS = (*layouts(), "asym_w6a8_int8")

# The machine, and what it multiplies by a product of its own; everything else is widened.
FLOAT8, INT8 = "torch._scaled_mm", "onednn.int8"
KITCHENS: dict[str, str] = {"int8_tensorwise": "comfy_kitchen.int8_linear",
                            "convrot_w4a4": "comfy_kitchen.convrot_w4a4_linear"}  # fmt: skip
FOUR = {"asym_w4a8_int8": "comfy_kitchen.w4a8_int8_linear"}
GROUPED = {**FOUR, "asym_w6a8_int8": "comfy_kitchen.w4a8_int8_linear"}
FP4 = {"nvfp4": "comfy_kitchen.scaled_mm_nvfp4", "mxfp8": "comfy_kitchen.scaled_mm_mxfp8"}
E4M3 = {"float8_e4m3fn": FLOAT8}
INT_MM = {"int8_tensorwise": "torch._int_mm"}
TABLE: dict[str, tuple[Machine, dict[str, str]]] = {
    "CPU with VNNI or AMX": (
        Machine("cpu", functions=frozenset((INT8,)), levels=255, bf16=True),
        {"int8_tensorwise": INT8},
    ),
    "CPU with AVX2": (
        Machine("cpu", functions=frozenset((INT8,)), levels=127), {"int8_tensorwise": INT8},
    ),
    "CPU without oneDNN": (Machine("cpu"), {}),
    "7.0": (Machine("cuda", (7, 0), ALL), {}),
    "7.5, torch only": (Machine("cuda", (7, 5), TORCH), INT_MM),
    "7.5": (Machine("cuda", (7, 5), ALL), KITCHENS),
    "8.0, torch only": (Machine("cuda", (8, 0), TORCH), INT_MM),
    "8.0": (Machine("cuda", (8, 0), ALL), KITCHENS | GROUPED),
    "8.6": (Machine("cuda", (8, 6), ALL), KITCHENS | GROUPED),
    "8.9, torch only": (Machine("cuda", (8, 9), TORCH), INT_MM | E4M3),
    "8.9": (Machine("cuda", (8, 9), ALL), KITCHENS | GROUPED | E4M3),
    "9.0": (Machine("cuda", (9, 0), ALL), KITCHENS | GROUPED | E4M3),
    "10.0, torch only": (Machine("cuda", (10, 0), TORCH), INT_MM | E4M3),
    "10.0": (Machine("cuda", (10, 0), ALL), KITCHENS | GROUPED | E4M3 | FP4),
    "12.0": (Machine("cuda", (12, 0), ALL), KITCHENS | GROUPED | E4M3 | FP4),
    "12.0 with an older comfy-kitchen": (
        Machine("cuda", (12, 0), ALL - {"comfy_kitchen.quantize_nvfp4",
                                        "comfy_kitchen.w4a8_int8_linear"}),
        KITCHENS | E4M3 | {"mxfp8": FP4["mxfp8"]},
    ),
    "8.0 with a comfy-kitchen without 6 bits": (
        Machine("cuda", (8, 0), ALL - {SIX}), KITCHENS | FOUR,
    ),
    "Intel's GPU": (Machine("xpu"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_each_format_gets_the_product_that_the_machine_has(name: str) -> None:
    machine, native = TABLE[name]
    found = {format: choose(format, machine, SHAPE) for format in FORMATS}
    assert {format: r.function for format, r in found.items() if r.function} == native
    assert all(rule.words for rule in found.values())


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_device_cannot_hold_is_told_with_what_fits(format: str) -> None:
    float8 = {"float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "svdquant_nvfp4", "asym_w4a8_int8",
              "asym_w6a8_int8"}  # fmt: skip
    for kind in NO_FLOAT8:
        if format not in float8:
            assert not choose(format, Machine(kind), SHAPE).function
            continue
        with pytest.raises(MachineError, match=f"stored as {format}.*GGUF Q8_0 or bf16.*the CPU"):
            choose(format, Machine(kind), SHAPE)


@pytest.mark.parametrize("format", RULES)
def test_odd_sides_and_files_that_forbid_rounding_are_widened(format: str) -> None:
    machine = Machine("cuda", (12, 0), ALL)
    assert choose(format, machine, SHAPE).function
    assert not choose(format, machine, (4096, 100)).function
    assert not choose(format, machine, (4097, 4096)).function
    assert not choose(format, machine, SHAPE, exact=True).function


def test_this_machine_is_asked() -> None:
    machine = machine_of(torch.device("cpu"))
    assert machine.kind == "cpu" and machine.levels in (0, 127, 255)
    assert ("onednn.int8" in machine.functions) == bool(machine.levels)


def test_functions_of_comfy_kitchen_are_probed_one_by_one() -> None:
    """Only those that a part for cards has, and no part that is there but does not load."""
    parts: dict[str, Any] = {
        "eager": {"available": True, "capabilities": [*FUNCTIONS]},
        "triton": {"available": False, "capabilities": []},
        "cuda": {"available": True, "capabilities": ["int8_linear", "quantize_mxfp8"]},
    }
    library = SimpleNamespace(list_backends=lambda: parts)
    has = {name for name in FUNCTIONS if has_kernel(library, name)}
    assert has == {"int8_linear", "quantize_mxfp8", "scaled_mm_mxfp8"}
    parts["cuda"]["available"] = False
    assert not any(has_kernel(library, name) for name in FUNCTIONS)
    assert not has_kernel(SimpleNamespace(), "int8_linear")


def test_the_installed_comfy_kitchen_has_all_of_them() -> None:
    """Names and not kernels, which a CPU has none of: a renamed function is seen here."""
    pytest.importorskip("comfy_kitchen")
    wanted = [*(KITCHEN + name for name in FUNCTIONS), SIX]
    assert kitchen_functions(lambda library, name: True) == wanted


# ---- the products' numbers ---------------------------------------------------------------------

OUT, IN, ROWS = 128, 512, 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(format: str) -> Layout:
    """A layout with random weights, as comfy-kitchen stores them."""
    ck, w, settings = pytest.importorskip("comfy_kitchen"), draw(OUT, IN), {}
    if format == "float8_e4m3fn":
        scale = w.abs().max() / 448
        tensors = {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    elif format.startswith("int8"):
        if "ConvRot" in format:
            settings = {"convrot": True}
            eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
            q, scale = eager.quantize_int8_convrot_weight(w, 256)
        else:
            q, scale = ck.quantize_int8_rowwise(w)
        tensors = {"weight": q, "weight_scale": scale}
    elif format == "convrot_w4a4":
        q, scale = ck.quantize_convrot_w4a4_weight(w)
        tensors = {"weight": q, "weight_scale": scale}
    elif format == "mxfp8":
        q, scale = ck.quantize_mxfp8(w)
        tensors = {"weight": q, "weight_scale": scale}
    elif format == "nvfp4":
        top = w.abs().max() / (448 * 6)
        q, scale = ck.quantize_nvfp4(w, top)
        tensors = {"weight": q, "weight_scale": scale, "weight_scale_2": top}
    else:
        bits = 6 if "6 bits" in format else 4
        q, relative, whole, _, table = ck.quantize_w4a8_int8_weight(w, bits=bits, codebook=bits < 6)
        tensors = {"weight": q, "weight_s_rel": relative, "weight_s_channel": whole}
        tensors |= {} if table is None else {"weight_codebook": table}
    name = format.partition(" ")[0]
    return layout_of(name, Parts(tensors, (OUT, IN), settings=settings))


# Anywhere: the function, and how far rounded inputs may take it off: one part in 127, 15 or 6.
ANYWHERE = [
    ("int8_tensorwise", "comfy_kitchen.int8_linear", 1.5e-2),
    ("int8_tensorwise ConvRot", "comfy_kitchen.int8_linear", 1.5e-2),
    ("int8_tensorwise", "torch._int_mm", 1.5e-2),
    ("int8_tensorwise ConvRot", "torch._int_mm", 1.5e-2),
    ("convrot_w4a4", "comfy_kitchen.convrot_w4a4_linear", 0.2),
    ("asym_w4a8_int8", "comfy_kitchen.w4a8_int8_linear", 1.5e-2),
    ("asym_w4a8_int8, 6 bits", "comfy_kitchen.w4a8_int8_linear", 1.5e-2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "function", "limit"), ANYWHERE)
def test_products_that_run_anywhere(
    format: str, function: str, limit: float, dtype: torch.dtype
) -> None:
    """The arguments are in their places: weights, scales, rotation; the output is x's dtype."""
    layout = made(format.replace(",", ""))
    x = draw(2, ROWS // 2, IN, seed=1).to(dtype)
    exact = F.linear(x.float(), layout.weight())
    y = layout.multiply(function, x)
    assert y.dtype == dtype and y.shape == exact.shape
    off = (y.float() - exact).norm() / exact.norm()
    assert 1e-5 < off < limit


def test_few_rows_are_filled_up_for_cublas() -> None:
    layout = made("int8_tensorwise")
    x = draw(3, IN)
    whole = kernels.int8_of_torch(draw(40, IN).index_copy(0, torch.arange(3), x),
                                  layout.stored, layout.scale)  # fmt: skip
    assert torch.equal(kernels.int8_of_torch(x, layout.stored, layout.scale), whole[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("format", [
    "float8_e4m3fn", "mxfp8", "nvfp4", "int8_tensorwise", "int8_tensorwise ConvRot",
    "convrot_w4a4", "asym_w4a8_int8", "asym_w4a8_int8 6 bits",
])  # fmt: skip
@pytest.mark.parametrize("rows", [3, 40])
def test_on_a_card_a_layer_multiplies_by_its_weight(format: str, rows: int) -> None:
    """By what the card has; the limit is that of inputs rounded to 4 bits where it has that."""
    layout = made(format).to(torch.device("cuda"))
    layer = QuantizedLinear(layout, None, Buffer())
    x = draw(rows, IN, seed=1).to("cuda", torch.bfloat16)
    exact = F.linear(x.float(), layout.weight())
    four = layout.native in ("int4 products", "nvfp4 products")
    limit = 0.2 if four else 5e-2 if "float8" in layout.native or "mx" in layout.native else 2e-2
    y = layer(x)
    assert y.dtype == x.dtype
    assert (y.float() - exact).norm() < limit * exact.norm()


# ---- what is not quantized -----------------------------------------------------------------------

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN: list[tuple[Machine, dict[torch.dtype, tuple[Any, Any]]]] = [
    # stored: what a DiT or an encoder is kept in, what a VAE; None as stored
    (Machine("cpu"), {F32: (None, None), BF16: (None, None), F16: (None, None)}),
    (Machine("cpu", bf16=True), {F32: (None, None), BF16: (BF16, BF16), F16: (None, None)}),
    (Machine("cuda", (7, 5)), {F32: (F16, F32), BF16: (F16, F32), F16: (F16, F32)}),
    (Machine("cuda", (8, 6), bf16=True), {F32: (BF16, None), BF16: (None, None)}),
    (Machine("cuda", (12, 0), bf16=True), {F32: (BF16, None), F16: (None, None)}),
    (Machine("mps"), {F32: (None, None), BF16: (None, None)}),
]


@pytest.mark.parametrize(("machine", "wanted"), PLAIN, ids=str)
def test_plain_numbers_become_what_is_multiplied_fastest(machine: Machine, wanted: Any) -> None:
    for stored, (network, vae) in wanted.items():
        assert automatic("dit", stored, machine) == network
        assert automatic("encoder", stored, machine) == network
        assert automatic("vae", stored, machine) == vae


@pytest.mark.parametrize("fast", [True, False])
def test_auto_says_what_it_chose(tmp_path: Path, tiny: Any, monkeypatch: Any, fast: bool) -> None:
    files = tiny.tiny_model(tmp_path, BF16)
    machine = Machine("cpu", bf16=fast)
    monkeypatch.setattr("seedling.model_loaders.load.machine_of", lambda device: machine)
    monkeypatch.setattr("seedling.model_loaders.load.has_bf16_products", lambda: fast)
    loaded, stored = load_dit(files.dit, dtype="auto"), load_dit(files.dit)
    assert [note for note in loaded.notes if note.startswith("auto: ")] == [
        "auto: what is not quantized is kept in bfloat16, on this processor."
    ]
    assert any("multiplies bf16" in note for note in loaded.notes) == fast
    assert not any("auto" in note or "multiplies bf16" in note for note in stored.notes)


def test_a_format_that_the_device_cannot_hold_is_told_before_it_is_read(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_file(tiny.tiny_model(tmp_path).dit)
    state = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}
    save_file(state, tmp_path / "float8.safetensors")
    load_dit(tmp_path / "float8.safetensors")
    monkeypatch.setattr("seedling.quant.machine.NO_FLOAT8", ("cpu",))
    with pytest.raises(CheckpointError, match=r"weight is stored as float8_e4m3fn.*GGUF Q8_0 or"):
        load_dit(tmp_path / "float8.safetensors")


@pytest.mark.parametrize("format", [*RULES][:-1])
def test_a_file_may_ask_for_inputs_that_are_not_rounded(format: str) -> None:
    """`full_precision_matrix_mult` of ComfyUI's settings, in every format that has a product."""
    layout = made(format)
    names = {"int8_tensorwise": ("stored", "scale"), "convrot_w4a4": ("stored", "scale")}
    own = dict(layout.named_buffers())
    tensors = {"weight": own["stored"], "weight_scale": own.get("scale", own.get("exponent"))}
    if format == "asym_w4a8_int8":
        tensors = {"weight": own["stored"], "weight_s_rel": own["scale"],
                   "weight_s_channel": own["whole"], "weight_codebook": own["table"]}  # fmt: skip
    elif format not in names and format != "float8_e4m3fn":
        scale = tiled(tensors["weight_scale"].view(torch.uint8))
        tensors |= {"weight_scale": scale, "weight_scale_2": torch.tensor(1.0)}
    settings = {"full_precision_matrix_mult": True}
    assert layout_of(format, Parts(tensors, (OUT, IN), settings=settings)).full
    assert not layout_of(format, Parts(tensors, (OUT, IN))).full
