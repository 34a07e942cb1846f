"""What a LoRA file holds for one layer: which tensors, of what shapes, and the delta they make."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from .checkpoint import Checkpoint, CheckpointError
from .header import damaged, printable

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.lora import Delta

DTYPES = ("F64", "F32", "F16", "BF16")
# Endings of names -> the part that such a tensor is; [^.]+ is the name of an adapter of PEFT.
ENDINGS = tuple(
    (re.compile(f"(?:{pattern})$"), part)
    for pattern, part in (
        (r"\.lora_A(\.[^.]+)?\.weight|\.lora_A|[._]lora[._]down\.weight", "down"),
        (r"\.lora_B(\.[^.]+)?\.weight|\.lora_B|[._]lora[._]up\.weight", "up"),
        (r"\.lora_linear_layer\.down\.weight", "down"),
        (r"\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_B(\.[^.]+)?\.bias|[._]lora[._]up\.bias", "up_bias"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.dora_scale|\.lora_magnitude_vector(\.[^.]+){0,2}", "magnitude"),
        (r"\.alpha", "alpha"),
        (r"\.diff|\.w_norm", "diff"),
        (r"\.diff_b|\.b_norm", "diff_b"),
        *((rf"\.lokr_{part}", f"lokr_{part}") for part in
          ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *((rf"\.hada_{part}", f"hada_{part}") for part in
          ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    )
)  # fmt: skip


def part_of(name: str) -> tuple[str, str] | None:
    """The layer's name and the part that the tensor `name` is; None for no part of a LoRA."""
    for ending, part in ENDINGS:
        if found := ending.search(name):
            layer = name[: found.start()]
            return (layer, part) if layer else None
    return None


@dataclass(frozen=True)
class Module:
    """One layer's part of a LoRA. `shape` is the delta's (out, in), or (n,) of a vector."""

    checkpoint: Checkpoint
    name: str
    tensors: Mapping[str, str]  # part -> name in the file
    form: str
    shape: tuple[int, ...]
    rank: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, tensors: Mapping[str, str]) -> Module:
        """Checks that the parts are complete and that their shapes add up."""
        return _Header(checkpoint, name, tensors).module()

    @property
    def has_weight(self) -> bool:
        """Whether the weight changes, and not only the bias."""
        return self.form != BIAS


BIAS = "bias difference"


@dataclass(frozen=True)
class _Header:
    """Reads one module's shapes. Every fault is a CheckpointError with the file and the layer."""

    checkpoint: Checkpoint
    name: str
    tensors: Mapping[str, str]

    def module(self) -> Module:
        for part, key in self.tensors.items():
            info = self.checkpoint.names[key]
            if info.dtype not in DTYPES:
                self.refuse(f"is stored as {info.dtype}, needed are floating-point numbers")
            if part == "alpha" and info.numel != 1:
                self.refuse(f"has an alpha of {info.numel} numbers, needed is one")
        form, shape, rank = self.form()
        if {"up_bias", "diff_b"} <= {*self.tensors}:
            self.refuse("has two biases")
        for part in ("up_bias", "diff_b"):
            if part in self.tensors and self.shape(part) != shape[:1]:
                self.refuse(f"has a bias of shape {self.shape(part)}, needed is {shape[:1]}")
        if "magnitude" in self.tensors:
            if math.prod(self.shape("magnitude")) != shape[0] or self.shape("magnitude")[0] == 1:
                self.refuse("has a DoRA scale for inputs; readable are scales for outputs")
            form = f"DoRA ({form})" if form != "LoRA" else "DoRA"
        return Module(self.checkpoint, self.name, self.tensors, form, shape, rank)

    def form(self) -> tuple[str, tuple[int, ...], int | None]:
        parts = {*self.tensors}
        if parts & {"down", "up", "mid"}:
            if "mid" in parts:
                self.refuse("is a LoRA of a convolution, which no layer here is")
            return self.low_rank("down", "up")
        if any(part.startswith("lokr") for part in parts):
            return self.kronecker()
        if any(part.startswith("hada") for part in parts):
            return self.hadamard()
        if "diff" in parts:
            shape = self.shape("diff")
            return "difference", shape if len(shape) == 1 else self.matrix("diff"), None
        if "diff_b" in parts:
            return BIAS, self.shape("diff_b"), None
        self.refuse("is incomplete: there is no part that changes the weight")

    def low_rank(self, down: str, up: str) -> tuple[str, tuple[int, ...], int]:
        self.need(down, up)
        (rank, ins), (outs, other) = self.matrix(down), self.matrix(up)
        if rank != other or not rank:
            self.refuse(f"has {down} of {rank} x {ins}, {up} of {outs} x {other}: unequal ranks")
        return "LoRA", (outs, ins), rank

    def kronecker(self) -> tuple[str, tuple[int, ...], int | None]:
        sides, rank = [], None
        for w in ("lokr_w1", "lokr_w2"):
            if w in self.tensors:
                sides.append(self.matrix(w))
            elif w == "lokr_w2" and "lokr_t2" in self.tensors:
                outs, ins, rank = self.tucker("lokr_t2", "lokr_w2_a", "lokr_w2_b")
                sides.append((outs, ins))
            else:
                _, side, rank = self.low_rank(f"{w}_b", f"{w}_a")
                sides.append(side)
        (a, b), (c, d) = sides
        return "LoKr", (a * c, b * d), rank

    def hadamard(self) -> tuple[str, tuple[int, ...], int]:
        sides, rank = [], 0
        for i in (1, 2):
            if f"hada_t{i}" in self.tensors:
                outs, ins, rank = self.tucker(f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")
                sides.append((outs, ins))
            else:
                _, side, rank = self.low_rank(f"hada_w{i}_b", f"hada_w{i}_a")
                sides.append(side)
        if sides[0] != sides[1]:
            self.refuse(f"multiplies {sides[0]} by {sides[1]}")
        return "LoHa", sides[0], rank

    def tucker(self, core: str, a: str, b: str) -> tuple[int, int, int]:
        """out, in, rank of einsum(core (i, j), a (i, out), b (j, in))."""
        self.need(core, a, b)
        (i, j), (other_i, outs), (other_j, ins) = self.matrix(core), self.matrix(a), self.matrix(b)
        if (i, j) != (other_i, other_j):
            self.refuse(f"has {core} of {i} x {j} for factors of rank {other_i} and {other_j}")
        return outs, ins, other_j

    def need(self, *parts: str) -> None:
        missing = [part for part in parts if part not in self.tensors]
        if missing:
            self.refuse(f"is incomplete: {' and '.join(missing)} missing")

    def shape(self, part: str) -> tuple[int, ...]:
        return self.checkpoint.names[self.tensors[part]].shape

    def matrix(self, part: str) -> tuple[int, int]:
        """The shape of a matrix; a kernel of one pixel counts as one."""
        shape = self.shape(part)
        if len(shape) < 2 or math.prod(shape[2:]) != 1:
            self.refuse(f"has {part} of shape {shape}, needed is a matrix")
        return shape[0], shape[1]

    def refuse(self, what: str) -> NoReturn:
        where = printable(self.name)
        raise CheckpointError(f"{self.checkpoint.name}: the LoRA of {where} {what}.")


# ---- tensors -----------------------------------------------------------------------------------


def weight_delta(module: Module) -> tuple[Delta | None, Tensor | None]:
    """What a module adds to the weight, and the magnitude (out,) of a DoRA. Nothing is copied."""
    from ..quant import lora

    def matrix(part: str) -> Tensor:
        return _tensor(module, part).flatten(1)

    def product(name: str, core: str) -> tuple[Tensor, ...]:
        """A matrix, or its two factors, or those of a Tucker decomposition."""
        if name in module.tensors:
            return (matrix(name),)
        a, b = matrix(f"{name}_a"), matrix(f"{name}_b")
        if core not in module.tensors:
            return a, b
        return a.mT, matrix(core), b

    delta: Delta | None = None
    if "down" in module.tensors:
        delta = lora.LowRank(matrix("down"), matrix("up"), _scale(module))
    elif module.form.endswith(("LoKr", "LoKr)")):
        w1, w2 = product("lokr_w1", ""), product("lokr_w2", "lokr_t2")
        delta = lora.Kronecker(w1, w2, _scale(module))
    elif module.form.endswith(("LoHa", "LoHa)")):
        w1, w2 = product("hada_w1", "hada_t1"), product("hada_w2", "hada_t2")
        delta = lora.Hadamard(*_two(w1), *_two(w2), _scale(module))
    elif "diff" in module.tensors:
        delta = lora.Full(_tensor(module, "diff").flatten(1) if len(module.shape) == 2 else
                          _tensor(module, "diff"))  # fmt: skip
    magnitude = _tensor(module, "magnitude").flatten() if "magnitude" in module.tensors else None
    return delta, magnitude


def _two(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    first, *rest = factors
    return (first, rest[0]) if len(rest) == 1 else (first, rest[0].float() @ rest[1].float())


def bias_delta(module: Module) -> Tensor | None:
    """What a module adds to the bias (out,)."""
    if "diff_b" in module.tensors:
        return _tensor(module, "diff_b")
    if "up_bias" in module.tensors:
        return _tensor(module, "up_bias") * _scale(module)
    return None


def _tensor(module: Module, part: str) -> Tensor:
    found = module.checkpoint.tensor(module.tensors[part])
    if part != "alpha" and not bool(found.isfinite().all()):
        raise CheckpointError(
            f"{module.checkpoint.name}: the LoRA of {printable(module.name)} has numbers that are "
            "none (NaN or infinite): its training failed, or the file is damaged; get another one."
        )
    return found


def _scale(module: Module) -> float:
    """alpha / rank; 1 where nothing says what alpha is, or where nothing is of low rank."""
    if module.rank is None:
        return 1.0
    if "alpha" in module.tensors:
        alpha = _tensor(module, "alpha").item()
        if not math.isfinite(alpha):
            where = printable(module.name)
            raise damaged(module.checkpoint.path, f"has an alpha of {alpha} for {where}")
        return alpha / module.rank
    settings = _settings(module.checkpoint)
    patterns = settings.get("alpha_pattern")
    own = [
        alpha
        for layer, alpha in (patterns.items() if isinstance(patterns, dict) else ())
        if f".{module.name}".endswith(f".{layer}")
    ]
    alpha = own[0] if own else settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)):
        return 1.0
    return alpha / (math.sqrt(module.rank) if settings.get("use_rslora") else module.rank)


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """PEFT's settings, as diffusers writes them into the metadata and PEFT beside the file."""
    text = checkpoint.metadata.get("lora_adapter_metadata")
    beside = checkpoint.path.with_name("adapter_config.json")
    if text is None and checkpoint.path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text("utf-8")
    try:
        settings = json.loads(text or "{}")
        return {key.removeprefix("transformer."): value for key, value in settings.items()}
    except (ValueError, AttributeError, RecursionError):
        raise damaged(checkpoint.path, "has settings of PEFT that are not valid JSON") from None
