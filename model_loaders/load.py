"""From a path to a module with weights: checked first, then mapped or streamed, never twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..quant.machine import Machine, machine_of
from ..quant.operations import TORCH, Operations, has_bf16_products, widened
from ..quant.streaming import RoomError, stream
from .bundle import part
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint, staging_buffer
from .detection import (
    PLAIN,
    Found,
    compare,
    config_of,
    detect,
    main_dtype,
    noun,
    refuse_differences,
    schedule_of,
    table_of,
    unknown,
    unused_note,
    variant_note,
    what_fits,
)
from .family import TITLES, Family, Kind, Licence, Schedule
from .lending import Lender
from .lora import is_lora
from .quantized import check_formats, formats, hold, quantization_note, state_of, written_out

# The folder of each component in a diffusers pipeline.
Precision = torch.dtype | Literal["auto"] | None
FOLDERS: dict[Kind, str] = {"dit": "transformer", "vae": "vae", "encoder": "text_encoder"}


@dataclass(frozen=True)
class Loaded:
    """A component that is ready to run, and what is known about it.

    `module` is the network, or what the family makes of it (an encoder with its tokenizer).
    `schedule` is there for a DiT. `checkpoint` has canonical names and can be read again; `notes`
    are for the user. `resident`: bytes of its weights on its device.
    """

    module: Any
    family: Family
    kind: Kind
    config: Any
    licence: Licence
    schedule: Schedule | None
    checkpoint: Checkpoint
    layout: str
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    resident: int = 0


def load_dit(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: Precision = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    vram: int | None = None,
) -> Loaded:
    """Load a diffusion model from a file, its folder, or the folder of the whole pipeline.

    `variant` says which of its family's models it is, where the file does not (`Family.variants`).

    Without `operations` and `dtype` weights stay as they are stored: 32 bits run in plain torch, 16
    bits on a CPU in `widened` layers, with fp32's arithmetic. Asking for bf16 by name also allows
    its arithmetic, where the processor has it; "auto" asks for what the machine computes fastest
    (`automatic`); `notes` then say so. Quantized weights stay as they are stored either way.

    `vram` bytes of weights may lie on `device`; blocks beyond that wait in the host's memory and
    pass through (`quant.streaming`; 0: all blocks). Raises CheckpointError: one sentence that names
    the file.
    """
    return _load(find("dit", path, variant), operations, dtype, device, vram)


def load_vae(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: Precision = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load a VAE; as `load_dit`. Off the CPU fp16 becomes bf16, whose range it needs."""
    return _load(find("vae", path), operations, dtype, device)


def load_encoder(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: Precision = None,
    device: torch.device | str = "cpu",
    tokenizer_paths: Sequence[Path | str] = (),
    vram: int | None = None,
) -> Loaded:
    """Load a text encoder with its tokenizer; as `load_dit`.

    The tokenizer is looked for beside the file and in `tokenizer_paths` (files or folders).
    """
    found = find("encoder", path)
    return _load(found, operations, dtype, device, vram, tokenizer_paths=tokenizer_paths)


def _load(
    found: Found,
    operations: Operations | None,
    precision: Precision,
    device: torch.device | str,
    vram: int | None = None,
    **finish: Any,
) -> Loaded:
    kind, device = found.component.kind, torch.device(device)
    config, own = config_of(found), operations is None
    coded, stored = bool(formats(found.checkpoint)), plain_dtype(found.checkpoint)
    dtype = precision if isinstance(precision, torch.dtype) else None
    if precision == "auto" and own and not coded:
        dtype = automatic(kind, stored, machine_of(device))
    quantized = dtype is None and coded
    if quantized and device.type != "cpu":
        dtype = arithmetic(device)
    operations, dtype = _precision(kind, operations, dtype, device, stored, quantized)
    module = table_of(found, config, operations, dtype)
    differences = compare(found, module)
    refuse_differences(found, differences)
    schedule = schedule_of(found) if kind == "dit" else None
    lender = Lender(module, found.component, found.checkpoint, dtype, device) if own else None
    place = device if vram is None else torch.device("cpu")
    fill(module, found.checkpoint, dtype, place, quantized)
    streamed, resident = _streamed(module, found, device, vram)
    lent = lender.into(module) if lender else ()
    ready: Any = module
    if found.component.finish is not None:
        ready = found.component.finish(module, found.checkpoint.path, **finish)
    return Loaded(
        module=ready,
        family=found.family,
        kind=kind,
        config=config,
        licence=found.family.licence_of(found.checkpoint),
        schedule=schedule,
        checkpoint=found.checkpoint,
        layout=found.layout.name,
        dtype=dtype or stored,
        resident=resident,
        notes=(
            *variant_note(found),
            *unused_note(differences),
            *lent,
            *streamed,
            *precision_note(operations),
            *(_automatic_note(dtype or stored, device) if precision == "auto" and own else ()),
            *quantization_note(module, found.checkpoint),
        ),
    )


def _streamed(
    module: nn.Module, found: Found, device: torch.device, vram: int | None
) -> tuple[tuple[str, ...], int]:
    """Move the network to `device`, but for blocks beyond `vram` bytes (None: all is there).

    A note for the user, and how many bytes of weights lie on the device.
    """
    whole = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    if vram is None:
        return (), whole
    try:
        streamer = stream(module, device, vram or None)
    except RoomError as error:
        raise CheckpointError(f"{found.checkpoint.name}: {error}") from None
    if streamer is None:
        return (), whole
    note = (
        f"{len(streamer.blocks)} of its blocks, {streamer.waiting / 1e9:.3g} GB, wait in the "
        f"host's memory and are copied while others compute; {streamer.bytes / 1e9:.3g} GB stay on "
        "the device."
    )
    return (note,), streamer.bytes


def automatic(kind: Kind, stored: torch.dtype, machine: Machine) -> torch.dtype | None:
    """The dtype of weights that `machine` multiplies fastest; None: as they are stored.

    bf16 where there are units for it, fp16 on cards before them. A VAE is not rounded any further:
    its picture shows it, and its time is short; without bf16's range it needs fp32's.
    """
    if machine.kind == "cpu":
        return torch.bfloat16 if stored == torch.bfloat16 and machine.bf16 else None
    if machine.kind != "cuda":
        return None
    if not machine.bf16:
        return torch.float32 if kind == "vae" else torch.float16
    return torch.bfloat16 if stored.itemsize > 2 and kind != "vae" else None


def _automatic_note(chosen: torch.dtype, device: torch.device) -> tuple[str, ...]:
    name = str(chosen).removeprefix("torch.")
    return (f"auto: what is not quantized is kept in {name}, on {machine_of(device)}.",)


def precision_note(operations: Operations) -> tuple[str, ...]:
    if operations.name != "bf16 products":
        return ()
    return (
        "This processor multiplies bf16 numbers itself: several times faster than fp32, rounded as "
        "bf16 rounds.",
    )


def plain_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most numbers that are not quantized; fp32 where all are."""
    plain = {name: info for name, info in checkpoint.names.items() if info.dtype in PLAIN}
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return getattr(torch, names[main_dtype(plain)])


def arithmetic(device: torch.device) -> torch.dtype:
    """What a card computes in: bf16, where it has that."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def find(kind: Kind, path: Path | str, variant: str | None = None) -> Found:
    """Open `path` and make sure that it is a `kind` that can be read. Reads headers only."""
    path = Path(path)
    if (path / "model_index.json").is_file() and (path / FOLDERS[kind]).is_dir():
        path = path / FOLDERS[kind]
    checkpoint = open_checkpoint(path)
    if is_lora(checkpoint.names):
        raise CheckpointError(f"{checkpoint.name} is a LoRA, not a whole model; {what_fits(kind)}.")
    found = detect(part(checkpoint, kind), variant)
    if found is None:
        raise CheckpointError(f"{unknown(checkpoint)}; {what_fits(kind)}.")
    if found.component.kind != kind:
        raise CheckpointError(
            f"{checkpoint.name} is {TITLES[found.component.kind]} ({found.family.name}), but was "
            f"given as {noun(kind)}; {what_fits(kind)}."
        )
    check_formats(found.checkpoint)
    return found


def _precision(
    kind: Kind,
    operations: Operations | None,
    dtype: torch.dtype | None,
    device: torch.device,
    stored: torch.dtype,
    quantized: bool = False,
) -> tuple[Operations, torch.dtype | None]:
    """The layers, and the dtype of all weights (None: each as it is stored)."""
    on_cpu = device.type == "cpu"
    if dtype is None and not on_cpu:
        dtype = torch.bfloat16 if (kind, stored) == ("vae", torch.float16) else stored
    if dtype is None and stored == torch.float64:
        dtype = torch.float32
    narrow = (dtype or stored).itemsize < 4 or quantized
    if operations is None:
        fast = dtype == torch.bfloat16 and has_bf16_products()
        operations = widened(narrow=fast) if on_cpu and narrow else TORCH
    if dtype is None and not operations.casts:
        dtype = stored  # plain layers multiply numbers of one kind only
    return operations, dtype


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device,
    quantized: bool = False,
) -> None:
    """Give a module on the meta device its weights, on `device`, in `dtype` or as they are stored.

    Weights that stay as they are on the CPU are mapped from the file: no copy. All others are
    streamed to where they belong through a small buffer. There is never a second copy of the model.
    Where `quantized`, layers keep quantized weights as they are stored; else these are written out.
    """
    if quantized:
        hold(module, checkpoint, dtype or torch.float32, device)
    weights: dict[str, torch.Tensor] = {}
    buffer: torch.Tensor | None = None
    for key in state_of(module):
        if checkpoint.names[key].form is not None:
            weights[key] = written_out(checkpoint, key, dtype or torch.float32, device)
            continue
        stored = checkpoint.torch_dtype(key)
        want = dtype or stored
        if device.type == "cpu" and want == stored:
            weights[key] = checkpoint.tensor(key)
        else:
            buffer = staging_buffer(device) if buffer is None else buffer
            weights[key] = torch.empty(checkpoint.names[key].shape, dtype=want, device=device)
            checkpoint.copy_into(key, weights[key], buffer)
    missing, _ = module.load_state_dict(weights, strict=False, assign=True)
    assert not {*missing} & {*state_of(module)}
    module.requires_grad_(False).eval()
    module.to(device)  # tables that no file holds; the weights are there already
