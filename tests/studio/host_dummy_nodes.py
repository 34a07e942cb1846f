"""Nodes for the tests of the host: small ones that work, and one for every way to misbehave."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import numpy
import torch
from comfy_api.latest import ComfyAPISync, ComfyExtension, io  # pyright: ignore[reportMissingImports]


def schema(node_id: str, inputs: list[Any], outputs: list[Any], **more: Any) -> Any:
    return io.Schema(node_id=node_id, category="test", inputs=inputs, outputs=outputs, **more)


class Noise(io.ComfyNode):
    """A picture of noise; says how often it ran."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "TestNoise",
            [
                io.Int.Input("seed", default=0, min=0, max=2**63),
                io.Int.Input("size", default=64, min=8, max=512),
                io.Int.Input("count", default=1, min=1, max=16, optional=True),
            ],
            [io.Image.Output()],
            display_name="Noise for Tests",
        )

    @classmethod
    def execute(cls, seed: int, size: int, count: int = 1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput(torch.rand(count, size, size, 3, generator=generator))


class Count(io.ComfyNode):
    """Hands its value on, and shows how often its process has run it."""

    runs: list[int] = []

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "TestCount", [io.AnyType.Input("value")], [io.AnyType.Output()], is_output_node=True
        )

    @classmethod
    def execute(cls, value: Any) -> Any:
        cls.runs.append(1)
        return io.NodeOutput(value, ui={"runs": [len(cls.runs)], "pid": [os.getpid()]})


class Steps(io.ComfyNode):
    """Takes time, in steps that can be cancelled."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "TestSteps",
            [
                io.Int.Input("steps", default=5, min=1, max=100_000),
                io.Float.Input("seconds", default=0.01, min=0.0, max=100.0),
            ],
            [io.Int.Output()],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    def execute(cls, steps: int, seconds: float) -> Any:
        api = ComfyAPISync()
        for step in range(steps):
            time.sleep(seconds)
            picture = torch.full((8, 8, 3), step / steps) if step % 4 == 0 else None
            api.execution.set_progress(step + 1, steps, preview_image=picture)
        return io.NodeOutput(steps, ui={"steps": [steps]})


class Bad(io.ComfyNode):
    """Fails in the way that its widget says."""

    WAYS = ("raise", "exit", "keyboard", "memory", "kill", "quit", "recursion", "unprintable",
            "deaf", "float32", "bytes", "nan", "set", "long", "outputs", "async")  # fmt: skip

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "TestBad",
            [io.Combo.Input("way", list(cls.WAYS)), io.Int.Input("salt", default=0, optional=True)],
            [io.Int.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, way: str, salt: int = 0) -> Any:
        shown = {
            "float32": numpy.float32(1), "bytes": b"x", "nan": float("nan"), "set": {1},
            "long": "x" * (20 * 2**20),
        }  # fmt: skip
        if way in shown:
            return io.NodeOutput(1, ui={"value": [shown[way]]})
        if way == "outputs":
            return io.NodeOutput()
        if way == "async":
            return cls.later()
        fail(way)

    @classmethod
    async def later(cls) -> Any:
        await asyncio.sleep(0.01)
        raise ValueError("an async node failed")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def fail(way: str) -> None:
    if way == "kill":
        os.kill(os.getpid(), 9)
    elif way == "quit":
        os._exit(3)
    elif way == "recursion":
        fail(way)
    elif way == "deaf":
        while True:  # never asks whether it was cancelled
            time.sleep(0.05)
    errors = {
        "exit": SystemExit(1), "keyboard": KeyboardInterrupt(), "memory": MemoryError(),
        "unprintable": Unprintable(),
    }  # fmt: skip
    raise errors.get(way, ValueError("This node fails on purpose; choose another."))


class Pairs(io.ComfyNode):
    """Gives a list: 1, 2, ... one by one."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "TestList",
            [io.Int.Input("count", default=2, min=0, max=8)],
            [io.Int.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, count: int) -> Any:
        return io.NodeOutput(list(range(1, count + 1)))


class Dynamic(io.ComfyNode):
    """Growing and dynamic inputs; shows what it got."""

    @classmethod
    def define_schema(cls) -> Any:
        grow = io.Autogrow.TemplatePrefix(io.Int.Input("n"), prefix="n", min=1, max=3)
        names = io.Autogrow.TemplateNames(io.Image.Input("r"), names=["one", "two"], min=0)
        options = [
            io.DynamicCombo.Option("plain", []),
            io.DynamicCombo.Option("tuned", [io.Float.Input("strength", default=0.5, max=1.0)]),
        ]
        return schema(
            "TestDynamic",
            [
                io.Autogrow.Input("numbers", template=grow),
                io.Autogrow.Input("refs", template=names, optional=True),
                io.DynamicCombo.Input("mode", options=options),
            ],
            [io.Int.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, numbers: dict, mode: dict, refs: dict | None = None) -> Any:
        return io.NodeOutput(
            sum(numbers.values()), ui={"got": [{"numbers": numbers, "mode": mode, "refs": refs}]}
        )


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [Noise, Count, Steps, Bad, Pairs, Dynamic]


async def comfy_entrypoint() -> Extension:
    return Extension()
