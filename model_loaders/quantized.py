"""Quantized weights from files into layers, as they are stored or written out."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, CheckpointError
from .header import TensorInfo, printable, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..quant.layouts import Layout

EMPTY = ("joined", "stacked")  # forms that only put a file's tensors together


def formats(checkpoint: Checkpoint) -> Counter[str]:
    """How many weights are quantized in each format; of GGUF, in each type."""
    forms = [(info.form, info.dtype) for info in checkpoint.names.values() if info.form]
    found = Counter[str]()
    for form, dtype in forms:
        if form.format == "gguf":
            found[f"GGUF {dtype}"] += 1
        elif form.format not in EMPTY and not form.format.endswith("_vector"):
            found[form.format] += 1
    return found


def quantization(checkpoint: Checkpoint) -> str | None:
    """The formats in words, the most frequent first; None for plain floating-point numbers."""
    found = formats(checkpoint)
    return ", ".join(name for name, _ in found.most_common()) or None


def check_formats(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, with the layer's name, for a format that nobody here can read."""
    if not any(info.form for info in checkpoint.names.values()):
        return
    from ..quant.layouts import layouts

    known = {*layouts(), *EMPTY}
    for name, info in checkpoint.names.items():
        if info.form and info.form.format not in known:
            readable = ", ".join(sorted(known.difference(EMPTY)))
            raise CheckpointError(
                f"{checkpoint.name}: {printable(name)} is quantized as "
                f"{printable(info.form.format)}, which is unknown; readable are {readable}."
            )


def layout_of_tensor(
    checkpoint: Checkpoint, name: str, device: torch.device, copied: bool = False
) -> Layout:
    """A quantized weight as it is stored, on `device`: mapped from the file where that is the CPU,
    unless it is to be `copied`.

    Raises CheckpointError, with the layer's name, where its tensors do not fit its format.
    """
    from ..quant.layouts import LayoutError
    from ..quant.machine import MachineError, choose, machine_of

    info = checkpoint.names[name]
    try:
        if info.form is not None:  # before any of it is read
            choose(info.form.format, machine_of(device), (1, 1))
        return _layout(checkpoint, info, info.rows, copied).to(device)
    except LayoutError as error:
        raise CheckpointError(
            f"{shown(info.file)}: {printable(name)} {error}; download it again, or use another "
            "file."
        ) from None
    except MachineError as error:
        raise CheckpointError(f"{shown(info.file)}: {printable(name)} {error}.") from None


def _layout(
    checkpoint: Checkpoint, info: TensorInfo, rows: tuple[int, int] | None, copied: bool
) -> Layout:
    from ..quant import layouts

    form = info.form
    if form is None:
        return layouts.Plain(_copied(checkpoint, info) if copied else checkpoint.mapped(info))
    if form.format == "joined":
        parts = [_layout(checkpoint, part, None, copied) for part in form.parts.values()]
        return layouts.Joined(parts)
    kind = layouts.layouts()[form.format]
    tensors = {
        key: _copied(checkpoint, part) if copied or kind.reorders else checkpoint.mapped(part)
        for key, part in form.parts.items()
    }
    shape = (info.shape[0], math.prod(info.shape[1:])) if info.shape else (1, 1)
    return layouts.layout_of(
        form.format, layouts.Parts(tensors, shape, rows, form.out, form.settings)
    )


def _copied(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """In memory, not mapped: pages of a file that are read once would stay resident too."""
    import torch

    out = torch.empty(info.shape, dtype=checkpoint.dtype_of(info))
    checkpoint.stream(info, out)
    return out


def hold(
    module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Put quantized layers in the place of those whose weights the file has quantized.

    `dtype` is what embeddings give. Parameters of other kinds (a convolution, a norm) are left for
    `written_out`.
    """
    from torch import nn

    from ..quant.linear import Buffer, QuantizedEmbedding, QuantizedLinear

    buffer = Buffer()
    for path, layer in [*module.named_modules()]:
        info = checkpoint.names.get(f"{path}.weight")
        if info is None or info.form is None or getattr(layer, "weight", None) is None:  # lent
            continue
        if isinstance(layer, nn.Linear):
            layout = layout_of_tensor(checkpoint, f"{path}.weight", device)
            module.set_submodule(path, QuantizedLinear(layout, layer.bias, buffer))
        elif isinstance(layer, nn.Embedding):
            layout = layout_of_tensor(checkpoint, f"{path}.weight", device)
            module.set_submodule(path, QuantizedEmbedding(layout, dtype))


def state_of(module: nn.Module) -> list[str]:
    """The names in a network's state that files know: all but those of its layouts."""
    from ..quant.linear import Holder

    own = tuple(f"{path}." for path, m in module.named_modules() if isinstance(m, Holder))
    kept = (key for key in module.state_dict() if not key.startswith(own) or key.endswith(".bias"))
    return list(kept)


def quantization_note(module: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """One sentence on how a quantized file is multiplied here, or nothing."""
    found = quantization(checkpoint)
    if found is None:
        return ()
    from ..quant.linear import Holder

    layouts = [m.layout for m in module.modules() if isinstance(m, Holder) and m.layout.bytes]
    if not layouts:
        return (f"The file has its weights as {found}; they were written out.",)
    native = Counter(layout.native for layout in layouts if layout.native)
    size = sum(layout.bytes for layout in layouts) / 1e9
    kept = f"Weights stay as the file has them, {found}, {size:.3g} GB"
    rest = len(layouts) - native.total()
    if not native:
        return (f"{kept}; this machine multiplies them after widening, block by block.",)
    how = ", ".join(f"{count} layers by {name}" for name, count in native.items())
    also = f", {rest} after widening, block by block" if rest else ""
    return (f"{kept}; multiplied {how}{also}.",)


def written_out(
    checkpoint: Checkpoint, key: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A quantized tensor in full precision, made block by block."""
    import torch

    from ..quant.linear import write_weight

    layout = layout_of_tensor(checkpoint, key, torch.device("cpu"))
    out = torch.empty(layout.shape, dtype=dtype, device=device)
    write_weight(layout, out)
    return out.view(checkpoint.names[key].shape)
