"""Every layout against the tools that write it: comfy-kitchen, bitsandbytes, torch, plain maths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seedling.quant import int8_product, linear
from seedling.quant.floats import tiled, untiled
from seedling.quant.layouts import Joined, Layout, LayoutError, Parts, Plain, layout_of
from seedling.quant.linear import Buffer, QuantizedEmbedding, QuantizedLinear, write_weight
from seedling.quant.rotation import is_group, rotate

OUT, IN = 96, 512


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(format: str, tensors: dict[str, Tensor], shape: tuple[int, int] = (OUT, IN), **settings):
    return layout_of(format, Parts(tensors, shape, settings=settings))


def kitchen() -> Any:
    return pytest.importorskip("comfy_kitchen")


def float8(dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[str, dict[str, Tensor], Tensor]:
    ck, w = kitchen(), draw(OUT, IN)
    scale = w.abs().max() / torch.finfo(dtype).max
    q = ck.quantize_per_tensor_fp8(w, scale, dtype)
    whole = ck.dequantize_per_tensor_fp8(q, scale, torch.float32)
    return str(dtype).removeprefix("torch."), {"weight": q, "weight_scale": scale}, whole


def int8(convrot: bool) -> tuple[dict[str, Tensor], Tensor]:
    ck, w = kitchen(), draw(OUT, IN)
    if not convrot:
        q, scale = ck.quantize_int8_rowwise(w)
        return {"weight": q, "weight_scale": scale}, ck.dequantize_int8_simple(q, scale)
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    q, scale = eager.quantize_int8_convrot_weight(w, 256)
    return {"weight": q, "weight_scale": scale}, eager.dequantize_int8_convrot_weight(q, scale, 256)


def grouped(bits: int, codebook: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    ck = kitchen()
    q, rel, channel, correction, table = ck.quantize_w4a8_int8_weight(
        draw(OUT, IN), bits=bits, codebook=codebook and bits == 4
    )
    assert correction is None
    whole = ck.dequantize_w4a8_int8_weight(q, rel, channel, table, output_dtype=torch.float32)
    tensors = {"weight": q, "weight_s_rel": rel, "weight_s_channel": channel}
    return tensors | ({} if table is None else {"weight_codebook": table}), whole


def made(name: str) -> tuple[Layout, Tensor]:
    """A layout with random weights, and those weights as the tool that made it reads them."""
    ck, w = kitchen(), draw(OUT, IN)
    if name.startswith("float8"):
        format, tensors, whole = float8(getattr(torch, name))
        return of(format, tensors), whole
    if name == "mxfp8":
        q, scale = ck.quantize_mxfp8(w)
        whole = ck.dequantize_mxfp8(q, scale, torch.float32)
        return of(name, {"weight": q, "weight_scale": scale}), whole
    if name == "nvfp4":
        top = w.abs().max() / (448 * 6)
        q, scale = ck.quantize_nvfp4(w, top)
        whole = ck.dequantize_nvfp4(q, top, scale, torch.float32)
        return of(name, {"weight": q, "weight_scale": scale, "weight_scale_2": top}), whole
    if name.startswith("int8"):
        tensors, whole = int8("convrot" in name)
        return of("int8_tensorwise", tensors, convrot="convrot" in name), whole
    if name == "convrot_w4a4":
        q, scale = ck.quantize_convrot_w4a4_weight(w)
        whole = ck.dequantize_convrot_w4a4_weight(q, scale, output_dtype=torch.float32)
        return of(name, {"weight": q, "weight_scale": scale}), whole
    tensors, whole = grouped(6 if "6" in name else 4, "even" not in name)
    return of("asym_w4a8_int8", tensors), whole


NAMES = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8", "int8 convrot", "convrot_w4a4",
         "w4a8", "w4a8 even", "w6a8")  # fmt: skip
ROTATED = ("convrot", "w4a8", "w6a8")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_comfy_kitchen(name: str) -> None:
    """Bit for bit; where a rotation is undone by a product, but for the order of its sums."""
    layout, whole = made(name)
    out = torch.empty(OUT, IN)
    write_weight(layout, out)
    if any(word in name for word in ROTATED):
        assert (out - whole).abs().max() < 2e-6 * whole.abs().max()
    else:
        assert torch.equal(out, whole)
    rows = torch.tensor([5, 0, 77])
    torch.testing.assert_close(layout.weight(rows), out[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_multiplies_by_its_weight(name: str) -> None:
    layout, whole = made(name)
    bias, x = draw(OUT, seed=1), draw(2, 7, IN, seed=2)
    layer = QuantizedLinear(layout, bias, Buffer())
    y, exact = layer(x), F.linear(x, whole, bias)
    assert y.shape == (2, 7, OUT) and y.dtype == x.dtype
    limit = 2e-2 if layout.native else 1e-5  # native: x is rounded to int8 too
    assert (y - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_in_memory_as_they_are_stored(name: str) -> None:
    bits = {"nvfp4": 4.5, "convrot_w4a4": 4, "w4a8": 4.5, "w4a8 even": 4.5, "w6a8": 6.5}
    layout, _ = made(name)
    needed = OUT * IN * bits.get(name, 8.25 if name == "mxfp8" else 8) / 8
    assert needed <= layout.bytes <= 1.05 * needed
    QuantizedLinear(layout, None, Buffer())(draw(3, IN))
    assert needed <= layout.bytes <= 1.05 * needed  # nor after the first product


@pytest.mark.parametrize("name", NAMES)
def test_no_cast_reaches_what_is_stored(name: str) -> None:
    layout, whole = made(name)
    before = {key: t.dtype for key, t in layout.named_buffers()}
    layout.to(torch.bfloat16)
    assert before == {key: t.dtype for key, t in layout.named_buffers()}
    assert (layout.weight() - whole).abs().max() < 2e-6 * whole.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_fused_layer(name: str) -> None:
    """A file may keep several layers as one: each takes its rows of everything."""
    whole, _ = made(name)
    parts = _parts_of(name)
    shape, rows = (32, IN), (32, 64)
    cut = layout_of(whole.format, Parts(parts[0], shape, rows, OUT, parts[1]))
    torch.testing.assert_close(cut.weight(), whole.weight(slice(*rows)), rtol=0, atol=1e-6)


def _parts_of(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings that `made` hands over."""
    caught: list[Any] = []

    def catch(format: str, tensors: dict[str, Tensor], *shape: Any, **settings: Any) -> Layout:
        caught.append((tensors, settings))
        return Plain(torch.ones(1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "of", catch)
        made(name)
    return caught[0]


def test_legacy_float8_without_scale_and_int8_with_one() -> None:
    q = draw(OUT, IN).to(torch.float8_e4m3fn)
    assert torch.equal(of("float8_e4m3fn", {"weight": q}).weight(), q.float())
    i = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    layout = of("int8_tensorwise", {"weight": i, "weight_scale": torch.tensor(0.5)})
    assert torch.equal(layout.weight(), i.float() * 0.5)


def test_smoothing_of_nvfp4_divides_nothing_away() -> None:
    """ComfyUI multiplies inputs by pre_quant_scale: the weight that counts is W diag(scale)."""
    ck = kitchen()
    top = torch.tensor(1e-3)
    q, scale = ck.quantize_nvfp4(draw(OUT, IN), top)
    smooth = draw(IN, seed=4).abs() + 0.5
    tensors = {"weight": q, "weight_scale": scale, "weight_scale_2": top}
    plain, smoothed = of("nvfp4", tensors), of("nvfp4", {**tensors, "pre_quant_scale": smooth})
    x = draw(3, IN, seed=5)
    y = QuantizedLinear(smoothed, None, Buffer())(x)
    torch.testing.assert_close(y, F.linear(x * smooth, plain.weight()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y, F.linear(x, smoothed.weight()), rtol=1e-5, atol=1e-4)


def test_the_product_is_told_what_a_file_says_of_its_inputs(monkeypatch: Any) -> None:
    """ComfyUI's linear_dtype, int4 where there is none. comfy-kitchen obeys it on cards only."""
    q, scale = kitchen().quantize_convrot_w4a4_weight(draw(OUT, IN))
    tensors, product = {"weight": q, "weight_scale": scale}, kitchen().convrot_w4a4_linear
    told: list[str] = []

    def linear(*args: Any, linear_dtype: str) -> Tensor:
        told.append(linear_dtype)
        return product(*args, linear_dtype=linear_dtype)

    monkeypatch.setattr(kitchen(), "convrot_w4a4_linear", linear)
    for settings in ({}, {"linear_dtype": "int8"}, {"params": {"linear_dtype": "int8"}}):
        layout = layout_of("convrot_w4a4", Parts(tensors, (OUT, IN), settings=settings))
        layout.multiply("comfy_kitchen.convrot_w4a4_linear", draw(2, IN))
    assert told == ["int4", "int8", "int8"]
    with pytest.raises(LayoutError, match="'int3'"):
        of("convrot_w4a4", tensors, linear_dtype="int3")


@pytest.mark.parametrize("rows, columns", [(128, 4), (96, 6), (300, 17)])
def test_tiles_of_scales(rows: int, columns: int) -> None:
    blocked = pytest.importorskip("comfy_kitchen").to_blocked
    scale = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    assert torch.equal(tiled(scale), blocked(scale, flatten=False))
    assert torch.equal(untiled(tiled(scale), rows, columns), scale)


def test_the_rotation_is_its_own_inverse_and_comfy_kitchens() -> None:
    hadamard = pytest.importorskip("comfy_kitchen.tensor.int8_utils")._build_hadamard
    x = draw(5, 512)
    assert (rotate(rotate(x)) - x).abs().max() < 1e-5
    for group in (4, 16, 64, 256):
        torch.testing.assert_close(rotate(torch.eye(group), group), hadamard(group))
    assert [n for n in range(1, 300) if is_group(n)] == [4, 16, 64, 256]


# ---- bitsandbytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind: str, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = draw(OUT, IN)
    q, state = bnb.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=nested)
    whole = bnb.dequantize_4bit(q, state)
    packed = state.as_dict(packed=True)
    name = f"quant_state.bitsandbytes__{kind}"
    import json

    settings = json.loads(bytes(packed.pop(name).tolist()))
    tensors = {"weight": q, **packed}
    layout = of(kind, tensors, **{k: v for k, v in settings.items() if k != "shape"})
    torch.testing.assert_close(layout.weight(), whole, rtol=0, atol=0 if not nested else 1e-6)
    cut = layout_of(kind, Parts(tensors, (32, IN), (64, 96), OUT, settings))
    assert torch.equal(cut.weight(), layout.weight(slice(64, 96)))


def test_int8_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = draw(OUT, IN).half()
    q, scale, _ = bnb.int8_vectorwise_quant(w)
    layout = of("llm_int8", {"weight": q, "SCB": scale})
    whole = bnb.int8_vectorwise_dequant(q, scale)
    torch.testing.assert_close(layout.weight(), whole, rtol=1e-6, atol=0)


# ---- layers ------------------------------------------------------------------------------------


def test_an_embedding_looks_up_rows() -> None:
    layout, whole = made("int8")
    ids = torch.tensor([[3, 3], [95, 0]])
    assert torch.equal(QuantizedEmbedding(layout, torch.float32)(ids), whole[ids])


def test_layers_share_one_buffer_of_the_largest_weight() -> None:
    buffer = Buffer()
    layers = nn.Sequential(*(
        QuantizedLinear(of("float8_e4m3fn", {"weight": draw(n, m).to(torch.float8_e4m3fn)}, (n, m)),
                        None, buffer) for n, m in ((64, 32), (16, 64), (8, 16))
    ))  # fmt: skip
    layers(draw(4, 32))
    assert buffer._room is not None and buffer._room.numel() == 64 * 32


@pytest.mark.parametrize("shape", [(64, 32), (5, 32), (1, 32), (130, 64)])
def test_a_cpu_multiplies_part_by_part(monkeypatch: Any, shape: tuple[int, int]) -> None:
    """The buffer holds one part; parts that do not divide the weight; gradients pass through."""
    monkeypatch.setattr(linear, "PART", 24 * 32)
    weight, buffer = draw(*shape).to(torch.float8_e4m3fn), Buffer()
    layout, bias = of("float8_e4m3fn", {"weight": weight}, shape), draw(shape[0], seed=1)
    layer, x = QuantizedLinear(layout, bias, buffer), draw(6, shape[1], seed=2).view(2, 3, -1)
    exact = F.linear(x, weight.float(), bias)
    assert torch.allclose(layer(x), exact, atol=1e-5) and layer(x).shape == exact.shape
    assert buffer._room is not None and buffer._room.numel() <= 24 * 32
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0, 0], weight.float().sum(dim=0), atol=1e-5)


def test_int8_products_are_exact_for_the_largest_numbers() -> None:
    """What would overflow sums of 16 bits; and the plain matrix comes back from the packed one."""
    if not int8_product.on_cpu():
        pytest.skip("this processor has no int8 products")
    weight = torch.full((64, 512), 127, dtype=torch.int8)
    weight[::2] = -128
    x = torch.full((4, 512), 5.0)
    x[:, 0], x[1] = -5.0, torch.where(torch.arange(512) % 2 == 0, 5.0, -5.0)
    packed = int8_product.Packed(weight)
    exact = x.double() @ weight.double().T
    y = packed(x, torch.ones(64, 1))
    assert (y - exact).abs().max() < 1e-2 * exact.abs().max()
    assert torch.equal(packed.matrix(), weight.float())


def test_int8_rows_are_rounded_each_for_itself() -> None:
    """A row of large numbers takes nothing from a row of small ones."""
    if not int8_product.on_cpu():
        pytest.skip("this processor has no int8 products")
    layout, whole = made("int8")
    x = draw(8, IN) * torch.logspace(-4, 3, 8)[:, None]
    y = layout.product(x)
    assert y is not None
    error = (y - x @ whole.T).norm(dim=1) / (x @ whole.T).norm(dim=1)
    assert error.max() < 2.5e-2


def test_weights_are_exchanged_as_comfyuis_lora_loader_does() -> None:
    """`get_key_weight` and `patch_weight_to_device` of its model patcher, and back."""
    layout, whole = made("w6a8")
    layer, x, delta = (
        QuantizedLinear(layout, draw(OUT, seed=1), Buffer()),
        draw(3, IN),
        draw(OUT, IN),
    )
    before, backup = layer(x), layer.weight
    layer.set_weight(layer.convert_weight(layer.weight.to(torch.float32), inplace=True) + delta)
    exact = F.linear(x, whole + delta, layer.bias)
    assert (layer(x) - exact).norm() < 1e-5 * exact.norm()
    layer.weight = backup
    assert torch.equal(layer(x), before)


def test_joined_layers() -> None:
    parts = [Plain(draw(4, 8)), Plain(draw(2, 8, seed=1)), Plain(draw(3, 8, seed=2))]
    whole = torch.cat([part.weight() for part in parts])
    joined = Joined(parts)
    assert torch.equal(joined.weight(), whole)
    assert torch.equal(joined.weight(slice(3, 7)), whole[3:7])


# ---- what does not fit -------------------------------------------------------------------------

I8 = torch.ones(OUT, IN, dtype=torch.int8)


@pytest.mark.parametrize(
    ("format", "tensors", "settings", "message"),
    [
        ("int9", {}, {}, "unknown format 'int9'"),
        ("int8_tensorwise", {"weight": I8}, {}, "lacks weight_scale"),
        ("int8_tensorwise", {"weight": I8[:5], "weight_scale": torch.ones(1)}, {}, "needed are 96"),
        ("int8_tensorwise", {"weight": I8, "weight_scale": torch.ones(7)}, {}, "1 or 96 numbers"),
        ("int8_tensorwise", {"weight": I8, "weight_scale": torch.tensor(torch.inf)}, {}, "no num"),
        ("int8_tensorwise", {"weight": I8, "weight_scale": torch.ones(1)},
         {"convrot": True, "convrot_groupsize": 100}, "rotation of 100"),
        ("int8_tensorwise", {"weight": I8, "weight_scale": torch.ones(1)}, {"convrot": "y"}, "'y'"),
        ("int8_tensorwise", {"weight": I8.float(), "weight_scale": torch.ones(1)}, {}, "float32"),
        ("mxfp8", {"weight": I8, "weight_scale": torch.ones(3, dtype=torch.uint8)}, {}, "128 x 16"),
        ("nvfp4", {"weight": I8, "weight_scale": torch.ones(3, dtype=torch.uint8)}, {}, "128 x 32"),
        ("asym_w4a8_int8", {"weight": I8, "weight_s_rel": torch.ones(OUT, 32)}, {}, "a weight of"),
        ("gguf", {"weight": I8}, {"type": "IQ1_S"}, "GGUF's type IQ1_S"),
        ("nf4", {"weight": I8.view(torch.uint8), "quant_map": torch.ones(16)}, {}, "a weight of"),
        ("svdquant_int4", {"weight": I8}, {}, "lacks proj_down"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(format, tensors, settings, message) -> None:
    with pytest.raises(LayoutError, match=message):
        of(format, tensors, **settings)
