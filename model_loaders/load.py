"""From a path to a module with weights: checked first, then mapped or streamed, never twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quant.operations import TORCH, Operations, has_bf16_products, widened
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
FOLDERS: dict[Kind, str] = {"dit": "transformer", "vae": "vae", "encoder": "text_encoder"}


@dataclass(frozen=True)
class Loaded:
    """A component that is ready to run, and what is known about it.

    `module` is the network, or what the family makes of it (an encoder with its tokenizer).
    `schedule` is there for a DiT. `checkpoint` has canonical names and can be read again; `notes`
    are for the user.
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


def load_dit(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> Loaded:
    """Load a diffusion model from a file, its folder, or the folder of the whole pipeline.

    `variant` says which of its family's models it is, where the file does not (`Family.variants`).

    Without `operations` and `dtype` weights stay as they are stored: 32 bits run in plain torch, 16
    bits on a CPU in `widened` layers, with fp32's arithmetic. Asking for bf16 by name also allows
    its arithmetic, where the processor has it; `notes` then say so. Raises CheckpointError: one
    sentence that names the file.
    """
    return _load(find("dit", path, variant), operations, dtype, device)


def load_vae(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load a VAE; as `load_dit`. Off the CPU fp16 becomes bf16, whose range it needs."""
    return _load(find("vae", path), operations, dtype, device)


def load_encoder(
    path: Path | str,
    *,
    operations: Operations | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer_paths: Sequence[Path | str] = (),
) -> Loaded:
    """Load a text encoder with its tokenizer; as `load_dit`.

    The tokenizer is looked for beside the file and in `tokenizer_paths` (files or folders).
    """
    found = find("encoder", path)
    return _load(found, operations, dtype, device, tokenizer_paths=tokenizer_paths)


def _load(
    found: Found,
    operations: Operations | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    **finish: Any,
) -> Loaded:
    kind, device = found.component.kind, torch.device(device)
    config, own = config_of(found), operations is None
    quantized = dtype is None and bool(formats(found.checkpoint))
    stored = plain_dtype(found.checkpoint)
    if quantized and device.type != "cpu":
        dtype = arithmetic(device)
    operations, dtype = _precision(kind, operations, dtype, device, stored, quantized)
    module = table_of(found, config, operations, dtype)
    differences = compare(found, module)
    refuse_differences(found, differences)
    schedule = schedule_of(found) if kind == "dit" else None
    lender = Lender(module, found.component, found.checkpoint, dtype, device) if own else None
    fill(module, found.checkpoint, dtype, device, quantized)
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
        notes=(
            *variant_note(found),
            *unused_note(differences),
            *lent,
            *precision_note(operations),
            *quantization_note(module, found.checkpoint),
        ),
    )


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
