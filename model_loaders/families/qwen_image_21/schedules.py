"""How checkpoints of Qwen-Image-2.1 want to be sampled: base, Turbo, and what says otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...family import Schedule

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

REASON_BASE = "nothing in or beside the file says that it is distilled"
BASE = Schedule(
    "base", steps=40, base_shift=0.5, max_shift=0.9, base_tokens=256, max_tokens=8192, terminal=0.02
)
# `sample_sigmas` in the model_index.json of Qwen-Image-2.1-Turbo.
TURBO_SIGMAS = (
    1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0,
)  # fmt: skip


def schedule(checkpoint: Checkpoint) -> Schedule:
    """How this DiT wants to be sampled; its names cannot tell a distilled checkpoint from the base.

    In this order: `schedule` in the file's own config, `sample_sigmas` in its metadata or in the
    model_index.json of the folder around it, a word in the file's name, the base model's schedule.
    """
    own = checkpoint.config.get("schedule")
    if isinstance(own, dict):
        return _own_schedule(own)
    sigmas = _sigmas(checkpoint.metadata.get("sample_sigmas"))
    if sigmas:
        return _listed(sigmas, "the file's metadata hold its list of sigmas")
    sigmas = _sigmas_beside(checkpoint.path)
    if sigmas:
        return _listed(sigmas, "model_index.json beside the folder holds its list of sigmas")
    return _named(checkpoint.path.name.lower())


def _named(name: str) -> Schedule:
    if "viggle" in name:
        steps = 6 if "6step" in name or "6-step" in name or "6_step" in name else 4
        reason = 'the file is called "viggle"; nothing in it says more, so check that it is'
        return replace(BASE, name="viggle", steps=steps, terminal=None, reason=reason)
    if "turbo" in name:
        return _listed(
            TURBO_SIGMAS, 'the file is called "turbo"; nothing in it says more, so check that it is'
        )
    return replace(BASE, reason=REASON_BASE)


def _listed(sigmas: tuple[float, ...], reason: str) -> Schedule:
    return Schedule("turbo", steps=len(sigmas) - 1, sigmas=sigmas, reason=reason)


def _own_schedule(own: dict[str, Any]) -> Schedule:
    """The base schedule with what the config changes. Raises ValueError for senseless values."""
    known = {"name": str, "steps": int, "guidance": float, "base_shift": float, "max_shift": float}
    known |= {"base_tokens": int, "max_tokens": int}
    changes: dict[str, Any] = {k: kind(own[k]) for k, kind in known.items() if k in own}
    if "terminal" in own:
        changes["terminal"] = None if own["terminal"] is None else float(own["terminal"])
    sigmas = _sigmas(own.get("sigmas"))
    if sigmas:
        changes |= {"sigmas": sigmas, "steps": len(sigmas) - 1}
    if changes.get("steps", 1) < 1:
        raise ValueError(f"the schedule in its config has {changes['steps']} steps")
    return replace(BASE, **changes, reason="the file's own config says so")


def _sigmas(values: Any) -> tuple[float, ...] | None:
    """A falling list of sigmas that ends at 0 (which is added where it is missing), or None."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            return None
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        return None
    sigmas = tuple(float(v) for v in values)
    sigmas = sigmas if sigmas[-1:] == (0.0,) else (*sigmas, 0.0)
    falling = all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))
    return sigmas if len(sigmas) > 1 and falling and sigmas[0] <= 1.0 else None


def _sigmas_beside(path: Path) -> tuple[float, ...] | None:
    """From a pipeline's model_index.json, given its component's folder or a file in that."""
    for folder in (path.parent, path.parent.parent):
        index = folder / "model_index.json"
        if index.is_file() and index.stat().st_size < 1 << 20:
            try:
                content = json.loads(index.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                return None
            return _sigmas(content.get("sample_sigmas")) if isinstance(content, dict) else None
    return None
