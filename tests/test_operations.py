"""Layers that keep 16-bit weights and compute in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seedling.quant.operations import TORCH, Operations, Scratch, widened

LAYERS = {
    "Linear": ((24, 40), {}, (3, 24)),
    "Linear without bias": ((24, 40), {"bias": False}, (3, 24)),
    "Conv2d": ((4, 6, 3), {"padding": 1, "stride": 2}, (2, 4, 8, 8)),
    "Conv2d, reflected": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 8, 8)),
    "LayerNorm": ((24,), {"eps": 1e-5}, (3, 24)),
    "LayerNorm without weights": ((24,), {"elementwise_affine": False}, (3, 24)),
    "RMSNorm": ((24,), {"eps": 1e-6}, (3, 24)),
}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", LAYERS)
def test_a_widened_layer_is_the_fp32_layer_bit_for_bit(case, stored):
    args, kwargs, shape = LAYERS[case]
    name = case.split(" ")[0].rstrip(",")
    torch.manual_seed(0)
    layer = getattr(widened(), name)(*args, **kwargs, dtype=stored)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    plain = getattr(TORCH, name)(*args, **kwargs)
    plain.load_state_dict(layer.state_dict())  # exact: 16 bits fit into 32
    x = torch.randn(shape)
    with torch.no_grad():
        out = layer(x)
        assert out.dtype == torch.float32
        assert torch.equal(out, plain(x))
        assert torch.equal(layer(x.to(stored)), plain(x.to(stored).float()))
    assert all(p.dtype == stored for p in layer.parameters())


@pytest.mark.parametrize("case", [name for name in LAYERS if name.startswith(("Lin", "Conv"))])
def test_narrow_products_round_inputs_and_results_to_bf16(case):
    args, kwargs, shape = LAYERS[case]
    name = case.split(" ")[0].rstrip(",")
    torch.manual_seed(0)
    layer = getattr(widened(narrow=True), name)(*args, **kwargs, dtype=torch.bfloat16)
    exact = getattr(widened(), name)(*args, **kwargs, dtype=torch.bfloat16)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        out, wanted = layer(x), exact(x.bfloat16())
    assert out.dtype == torch.float32 and torch.equal(out, out.bfloat16().float())
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=2**-7)


def test_a_widened_embedding_widens_the_rows_it_looks_up():
    layer = widened().Embedding(50, 8, dtype=torch.bfloat16)
    rows = torch.tensor([[3, 49]])
    weight = layer.get_parameter("weight")
    assert torch.equal(layer(rows), weight[rows].float())


def network(operations: Operations) -> nn.Sequential:
    torch.manual_seed(1)
    kw = {"dtype": torch.bfloat16}
    return nn.Sequential(
        operations.Linear(8, 64, **kw),
        operations.Linear(64, 16, **kw),
        operations.Linear(16, 4, **kw),
    )


def test_all_layers_share_one_buffer_of_the_largest_weight():
    model = network(widened())
    with torch.no_grad():
        model(torch.randn(5, 8))
    (buffer,) = scratch(model)._buffers.values()
    assert buffer.numel() == 64 * 16
    assert scratch(copy.deepcopy(model)) is not scratch(model)


def test_the_buffer_outlives_inference_mode():
    model, x = network(widened()), torch.randn(5, 8)
    with torch.inference_mode():
        inside = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), inside)
    assert torch.equal(model.requires_grad_(False)(x), inside)


def test_two_namespaces_share_nothing():
    assert scratch(network(widened())) is not scratch(network(widened()))


def scratch(model: nn.Sequential) -> Scratch:
    """The one that all layers share."""
    (found,) = {layer.scratch for layer in model}
    assert isinstance(found, Scratch)
    return found


def test_gradients_are_those_of_the_fp32_network():
    model, x = network(widened()), torch.randn(5, 8, requires_grad=True)
    model(x).square().sum().backward()
    plain = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 16), nn.Linear(16, 4))
    plain.load_state_dict(model.state_dict())
    y = x.detach().clone().requires_grad_()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())


def test_plain_torch_is_plain_torch():
    assert TORCH.Linear is nn.Linear and TORCH.RMSNorm is nn.RMSNorm and not TORCH.casts
    assert widened().casts
