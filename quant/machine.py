"""What a device can multiply, and which product a format gets on it.

All that is asked of a machine is in `Machine`, so that any card's answers can be written down;
`RULES` is the whole choice. A format without a rule that holds is widened: its weights become full
precision in passing. That always works, but where a device cannot even hold a format's numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

KITCHEN = "comfy_kitchen."
# The functions of comfy-kitchen that are used, where its CUDA or Triton part has them.
FUNCTIONS = (
    "convrot_w4a4_linear", "int8_linear", "quantize_mxfp8", "quantize_nvfp4", "scaled_mm_mxfp8",
    "scaled_mm_nvfp4", "w4a8_int8_linear",
)  # fmt: skip
SIX = f"{KITCHEN}quantize_w4a8_int8_weight(bits)"
# Formats with numbers or scales in float8, which Apple's GPUs do not have.
FLOAT8 = (
    "float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "svdquant_nvfp4", "asym_w4a8_int8",
    "asym_w6a8_int8",
)  # fmt: skip
NO_FLOAT8 = ("mps",)


class MachineError(ValueError):
    """A format that a device cannot hold. The message is the rest of a sentence, and what fits."""


@dataclass(frozen=True)
class Machine:
    """`kind` is torch's name of the device, `capability` that of a CUDA card (8.9 is (8, 9)).

    `functions`: what libraries offer for it, "torch._int_mm" or "comfy_kitchen.int8_linear".
    `levels`: the largest input code of an exact int8 product on a CPU (255 or 127, 0: none).
    `bf16`: whether it multiplies bf16 numbers faster than fp32 ones.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    functions: frozenset[str] = frozenset()
    levels: int = 0
    bf16: bool = False

    def __str__(self) -> str:
        if self.kind == "cpu":
            return "this processor"
        if self.kind == "cuda":
            return f"this card (compute capability {self.capability[0]}.{self.capability[1]})"
        return f"a device of the kind {self.kind}"


@dataclass(frozen=True)
class Rule:
    """`function` multiplies the format where the machine has it, from `least` on; both sides of the
    weight (out, in) must be multiples of `sides`. `needs` are other functions that it takes."""

    function: str
    words: str
    kind: str = "cuda"
    least: tuple[int, int] = (0, 0)
    sides: tuple[int, int] = (1, 1)
    needs: tuple[str, ...] = ()

    def holds(self, machine: Machine, shape: tuple[int, int]) -> bool:
        return (
            machine.kind == self.kind
            and machine.capability >= self.least
            and {self.function, *self.needs} <= machine.functions
            and all(n % side == 0 for n, side in zip(shape, self.sides, strict=True))
        )


WIDENED = Rule("", "widening, block by block")
INT8, FLOAT8_WORDS = "int8 products", "float8 products"
# In the order of preference. Capabilities: comfy-kitchen's own constraints, and of torch's float8
# product 8.9 (cuBLAS); sides: cuBLAS wants multiples of 8 (int8) or 16 (float8) of both.
RULES: dict[str, tuple[Rule, ...]] = {
    "float8_e4m3fn": (Rule("torch._scaled_mm", FLOAT8_WORDS, least=(8, 9), sides=(16, 16)),),
    "mxfp8": (
        Rule(f"{KITCHEN}scaled_mm_mxfp8", "mxfp8 products", least=(10, 0), sides=(16, 32),
             needs=(f"{KITCHEN}quantize_mxfp8",)),
    ),
    "nvfp4": (
        Rule(f"{KITCHEN}scaled_mm_nvfp4", "nvfp4 products", least=(10, 0), sides=(16, 32),
             needs=(f"{KITCHEN}quantize_nvfp4",)),
    ),
    "int8_tensorwise": (
        Rule("onednn.int8", INT8, kind="cpu"),
        Rule(f"{KITCHEN}int8_linear", INT8, least=(7, 5), sides=(8, 8)),
        Rule("torch._int_mm", INT8, least=(7, 5), sides=(8, 8)),
    ),
    "convrot_w4a4": (
        Rule(f"{KITCHEN}convrot_w4a4_linear", "int4 products", least=(7, 5), sides=(16, 64)),
    ),
    "asym_w4a8_int8": (
        Rule(f"{KITCHEN}w4a8_int8_linear", INT8, least=(8, 0), sides=(16, 64)),
    ),
    "asym_w6a8_int8": (  # the same of 6 bits, which came later
        Rule(f"{KITCHEN}w4a8_int8_linear", INT8, least=(8, 0), sides=(16, 64), needs=(SIX,)),
    ),
}  # fmt: skip


def choose(format: str, machine: Machine, shape: tuple[int, int], exact: bool = False) -> Rule:
    """The product for a weight (out, in) in `format` on `machine`; WIDENED where it has none, and
    where `exact`, which is a file's wish for inputs that are not rounded.

    Raises MachineError for a format that the device cannot hold.
    """
    if format in FLOAT8 and machine.kind in NO_FLOAT8:
        raise MachineError(
            f"is stored as {format}, whose float8 numbers {machine} does not have; use a file in "
            "int8, GGUF Q8_0 or bf16, or run it on the CPU"
        )
    rules = () if exact else RULES.get(format, ())
    return next((rule for rule in rules if rule.holds(machine, shape)), WIDENED)


def machine_of(device: torch.device) -> Machine:
    """The machine behind a torch device, asked once."""
    return _asked(device.type, device.index)


@lru_cache(maxsize=16)
def _asked(kind: str, index: int | None) -> Machine:
    if kind == "cpu":
        from .int8_product import levels
        from .operations import has_bf16_products

        most = levels()
        functions = frozenset(("onednn.int8",) if most else ())
        return Machine(kind, functions=functions, levels=most, bf16=has_bf16_products())
    if kind != "cuda":
        return Machine(kind)
    capability = torch.cuda.get_device_capability(index)
    own = (f"torch.{name}" for name in ("_int_mm", "_scaled_mm") if hasattr(torch, name))
    found = frozenset((*own, *kitchen_functions(has_kernel)))
    return Machine(kind, capability, found, bf16=capability >= (8, 0))


def kitchen_functions(has: Callable[[object, str], bool]) -> list[str]:
    """Those of `FUNCTIONS` that the installed comfy-kitchen has, one by one: it moves fast."""
    try:
        import comfy_kitchen
    except (ImportError, OSError, RuntimeError, AttributeError):  # not there, or for another torch
        return []
    found = [
        KITCHEN + name
        for name in FUNCTIONS
        if callable(getattr(comfy_kitchen, name, None)) and has(comfy_kitchen, name)
    ]
    maker = getattr(comfy_kitchen, "quantize_w4a8_int8_weight", None)
    if callable(maker) and "bits" in inspect.signature(maker).parameters:
        found.append(SIX)
    return found


def has_kernel(kitchen: object, name: str) -> bool:
    """Whether a part of comfy-kitchen that runs on cards has this function; its "eager" part, plain
    torch, is slower than widening. Its scaled_mm_mxfp8 is torch's own, whichever part has it."""
    listed = getattr(kitchen, "list_backends", None)
    parts: Any = listed() if callable(listed) else {}
    fast = [part for part in ("cuda", "triton") if parts.get(part, {}).get("available")]
    if name == "scaled_mm_mxfp8":
        return bool(fast)
    return any(name in parts[part]["capabilities"] for part in fast)
