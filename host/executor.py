"""Runs a prompt: node after node, each once for the same inputs, every fault with its node.

The order of events is ComfyUI's: execution_start, execution_cached, per node executing and
executed, then execution_success, execution_error or execution_interrupted. They are made into JSON
here, where the node that made something else can still be named.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cache import Cache, Result, keys
from .library import Library
from .paths import Folders
from .standin.dynamic import nested
from .standin.io import ExecutionBlocker, Hidden, HiddenValues, NodeOutput
from .standin.runtime import CURRENT, Interrupted, Runtime
from .unfold import Graph, unfold
from .validate import ancestors, is_link

LARGEST_UI = 8 * 2**20  # characters of JSON that a node may show

MOST_STATES = 64  # nodes in a progress_state: the running one and the last that ended

Send = Callable[[str, dict[str, Any]], None]
Preview = Callable[[dict[str, Any], Any], None]


class NodeError(ValueError):
    """A node that handed back what cannot be used."""


class Failed(BaseException):
    """Ends a run; its event is already sent."""


@dataclass
class Job:
    """A prompt that was judged, as the queue keeps it."""

    prompt_id: str
    prompt: dict[str, Any]
    targets: list[str]
    extra: dict[str, Any]


@dataclass
class Outcome:
    """How a job ended, for the history."""

    status: str = "error"  # success, error or interrupted
    messages: list[list[Any]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Executor:
    """Runs jobs one after the other over one cache."""

    def __init__(self, library: Library, folders: Folders, cache: Cache, send: Send) -> None:
        self.library, self.folders, self.cache, self.emit = library, folders, cache, send
        self.preview: Preview = lambda where, image: None
        self.text: Callable[[str, str], None] = lambda node_id, text: None
        self.stopped: Callable[[], bool] = lambda: False
        self.loop = asyncio.new_event_loop()

    def run(self, job: Job) -> Outcome:
        """Run a job to its end. Whatever a node raises ends the job, never the caller."""
        run = Run(self, job)
        self.cache.start()
        try:
            run.all()
            run.say("execution_success", timestamp=now())
            run.outcome.status = "success"
        except Failed:
            pass
        except BaseException as error:  # noqa: BLE001  not of a node: the job says it all the same
            run.fail(None, error, {})
        self.cache.trim()
        return run.outcome


class Run:
    """One job on its way."""

    def __init__(self, executor: Executor, job: Job) -> None:
        self.executor, self.job, self.outcome = executor, job, Outcome()
        self.library = executor.library
        kinds = {node["class_type"] for node in job.prompt.values()}
        self.schemas = {kind: self.library[kind].schema() for kind in kinds if kind in self.library}
        self.graph = Graph(job.prompt)
        self.names: dict[str, str] = {}  # of results in the cache
        self.results: dict[str, Result] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []

    def say(self, kind: str, **data: Any) -> None:
        data["prompt_id"] = self.job.prompt_id
        if kind.startswith("execution_"):
            self.outcome.messages.append([kind, data])
        self.executor.emit(kind, data)

    def all(self) -> None:
        """Every node that the targets need, in an order that respects the wires."""
        self.say("execution_start", timestamp=now())
        order: dict[str, None] = {}
        for target in self.job.targets:
            order |= dict.fromkeys(ancestors(self.job.prompt, target)[0])
        cache = self.executor.cache
        self.names = keys(self.job.prompt, order, self.schemas, self.constants, cache.run)
        cached = [node_id for node_id in order if cache.get(self.names[node_id])]
        self.say("execution_cached", nodes=cached, timestamp=now())
        for node_id in order:
            self.step(node_id)

    def step(self, node_id: str) -> None:
        """The result of a node, known or new."""
        known = self.executor.cache.get(self.names[node_id])
        if known and known.answers:  # what it unfolded into is kept too, and is shown again
            schema = self.schemas[self.graph.nodes[node_id]["class_type"]]
            known = self.sorted(node_id, schema, known.answers)
        if known:
            self.results[node_id] = known
            if known.ui is not None:
                self.show(node_id, known.ui)
            return
        self.results[node_id] = result = self.one(node_id)
        self.done.append(node_id)
        if not any(isinstance(v, ExecutionBlocker) for items in result.outputs for v in items):
            self.executor.cache.put(self.names[node_id], result)

    def constants(self, node_id: str) -> tuple[Any, dict[str, Any]]:
        """A node's class and its values, None for what a wire brings."""
        node = self.graph.nodes[node_id]
        schema = self.schemas[node["class_type"]]
        live = {k: None if is_link(v) else v for k, v in node["inputs"].items()}
        return self.library[node["class_type"]].cls, nested(schema.inputs, live)

    def one(self, node_id: str) -> Result:
        """Run a node; Failed when it did not end well."""
        self.say("executing", node=node_id, display_node=self.graph.real(node_id))
        self.progress(node_id, 0, 1, None)
        inputs: dict[str, list[Any]] = {}
        try:
            if self.executor.stopped():
                raise Interrupted
            inputs = self.inputs(node_id)
            result = self.call(node_id, inputs)
        except Interrupted:
            self.outcome.status = "interrupted"
            real = self.graph.real(node_id)
            kind = self.job.prompt[real]["class_type"]
            self.say(
                "execution_interrupted", node_id=real, node_type=kind, executed=list(self.done),
                timestamp=now(),
            )  # fmt: skip
            raise Failed from None
        except Failed:  # a node that this one unfolded into
            raise
        except BaseException as error:  # noqa: BLE001  SystemExit and MemoryError of a node, too
            self.fail(node_id, error, inputs)
            raise Failed from None
        if result.ui is not None:
            self.show(node_id, result.ui)
        self.progress(node_id, 1, 1, None, "finished")
        return result

    def inputs(self, node_id: str) -> dict[str, list[Any]]:
        """The items of each input, by path."""
        node = self.graph.nodes[node_id]
        found: dict[str, list[Any]] = {}
        for name, value in node["inputs"].items():
            if is_link(value):
                found[name] = self.results[value[0]].outputs[value[1]]
            else:
                found[name] = [value]
        return found

    def call(self, node_id: str, inputs: dict[str, list[Any]]) -> Result:
        """Call `execute`, once an item unless the node takes lists, and sort what comes back."""
        entry = self.library[self.graph.nodes[node_id]["class_type"]]
        schema = self.schemas[self.graph.nodes[node_id]["class_type"]]
        for items in inputs.values():
            for value in items:
                if isinstance(value, ExecutionBlocker):
                    if value.message:
                        raise NodeError(value.message)
                    return Result([[value] for _ in schema.outputs], None)
        longest = max((len(items) for items in inputs.values()), default=1)
        if schema.is_input_list:
            calls = [dict(inputs)]
        else:
            calls = [
                {name: items[min(k, len(items) - 1)] for name, items in inputs.items() if items}
                for k in range(longest if all(inputs.values()) else 0)
            ]
        cls = type(entry.cls.__name__, (entry.cls,), {"hidden": self.hidden(node_id, schema)})
        made = [self.execute(cls, schema, values, k) for k, values in enumerate(calls)]
        return self.sorted(node_id, schema, made)

    def hidden(self, node_id: str, schema: Any) -> HiddenValues:
        extra = self.job.extra
        known = {
            Hidden.unique_id: node_id, Hidden.prompt: self.job.prompt,
            Hidden.extra_pnginfo: extra.get("extra_pnginfo"), Hidden.dynprompt: self.graph,
        }  # fmt: skip
        return HiddenValues({key: known.get(key) for key in schema.hidden} | known)

    def execute(self, cls: Any, schema: Any, values: dict[str, Any], call: int) -> NodeOutput:
        given = nested(schema.inputs, values)
        if schema.accept_all_inputs:
            given = values | given
        node_id = cls.hidden.unique_id
        host = self.executor
        runtime = Runtime(host.folders, node_id, self.progress, host.stopped, self.tell, call)
        token = CURRENT.set(runtime)
        try:
            answer = cls.execute(**given)
            if inspect.iscoroutine(answer):
                answer = self.executor.loop.run_until_complete(answer)
        finally:
            CURRENT.reset(token)
        if isinstance(answer, NodeOutput):
            return answer
        if isinstance(answer, dict):
            return NodeOutput(*(answer.get("result") or ()), ui=answer.get("ui"))
        return NodeOutput(
            *(answer if isinstance(answer, tuple) else () if answer is None else (answer,))
        )

    def sorted(self, node_id: str, schema: Any, made: list[NodeOutput]) -> Result:
        """One result of all calls: items by output, ui lists joined."""
        outputs: list[list[Any]] = [[] for _ in schema.outputs]
        shown: dict[str, Any] | None = None
        for answer in made:
            values = unfold(self, node_id, answer) if answer.expand else answer.args
            if answer.block_execution is not None:
                values = tuple(ExecutionBlocker(answer.block_execution) for _ in schema.outputs)
            if len(values) < len(schema.outputs):
                raise NodeError(
                    f"The node gave {len(values)} outputs, its schema promises "
                    f"{len(schema.outputs)}."
                )
            for place, output, value in zip(outputs, schema.outputs, values, strict=False):
                if output.is_output_list and isinstance(value, list | tuple):
                    place.extend(value)
                else:
                    place.append(value)
            ui = answer.ui.as_dict() if hasattr(answer.ui, "as_dict") else answer.ui
            if ui:
                shown = joined(shown or {}, checked_ui(ui))
        return Result(outputs, shown, answers=made if any(a.expand for a in made) else [])

    def show(self, node_id: str, ui: dict[str, Any]) -> None:
        self.outcome.outputs[node_id] = ui
        real, parent = self.graph.real(node_id), self.graph.parents.get(node_id)
        self.outcome.meta[node_id] = {
            "node_id": node_id, "display_node": real, "parent_node": parent, "real_node_id": real,
        }  # fmt: skip
        self.say("executed", node=node_id, display_node=real, output=ui)
        # The page shows `text` of core's Preview as Text only; for other nodes it is sent as such.
        if self.graph.nodes[node_id]["class_type"] != "PreviewAny":
            for text in ui.get("text", ()):
                if isinstance(text, str):
                    self.tell(node_id, text)

    def tell(self, node_id: str, text: str) -> None:
        """Show a text on a node."""
        self.executor.text(self.graph.real(node_id), text)

    def progress(
        self, node_id: str, value: float, maximum: float, image: Any, state: str = "running"
    ) -> None:
        """Say how far a node is; `image` is shown on it."""
        real, parent = self.graph.real(node_id), self.graph.parents.get(node_id)
        where = {
            "node_id": node_id, "prompt_id": self.job.prompt_id, "display_node_id": real,
            "parent_node_id": parent, "real_node_id": real,
        }  # fmt: skip
        value, maximum = float(value), float(maximum)
        entry = {"value": value, "max": maximum, "state": state} | where
        self.states.pop(node_id, None)  # to the end: the map is in the order of the last change
        self.states[node_id] = entry
        while len(self.states) > MOST_STATES:  # a graph of thousands would send thousands each time
            del self.states[next(iter(self.states))]
        self.say("progress_state", nodes=dict(self.states))
        if state == "running" and value > 0:
            self.say("progress", value=value, max=maximum, node=node_id)
        if image is not None:
            self.executor.preview(where, image)

    def fail(self, node_id: str | None, error: BaseException, inputs: Mapping[str, Any]) -> None:
        """The event of a node that raised; never raises itself."""
        real = node_id and self.graph.real(node_id)
        kind = self.job.prompt[real]["class_type"] if real in self.job.prompt else None
        module = type(error).__module__
        name = type(error).__qualname__
        self.outcome.status = "error"
        if node_id is not None:
            self.progress(node_id, 0, 1, None, "error")
        self.say(
            "execution_error", node_id=real, node_type=kind, executed=list(self.done),
            exception_message=words(error),
            exception_type=name if module == "builtins" else f"{module}.{name}",
            traceback=traceback.format_tb(error.__traceback__)[-20:],
            current_inputs={key: [described(v) for v in items] for key, items in inputs.items()},
            current_outputs=list(self.done), timestamp=now(),
        )  # fmt: skip


def now() -> int:
    return int(time.time() * 1000)


def words(error: BaseException) -> str:
    """The text of an exception, if it can be had."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  an exception whose text raises
        text = ""
    return (text or type(error).__name__)[:10_000]


def described(value: Any) -> str:
    """An input as an error report shows it: small things as they are, tensors by their shape."""
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, str | int | float | bool) or value is None:
        try:
            return str(value)[:1000]
        except ValueError:  # an integer too long for text
            return "a long integer"
    return type(value).__name__


def checked_ui(ui: Any) -> dict[str, Any]:
    """What the page is shown, as plain JSON; NodeError that names the key otherwise."""
    if not isinstance(ui, dict):
        raise NodeError(f"'ui' must be a dict of lists; the node gave a {type(ui).__name__}.")
    checked: dict[str, Any] = {}
    for key, value in ui.items():
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise NodeError(f"What the node shows under {key!r} is not JSON: {error}.") from None
        if len(text) > LARGEST_UI:
            raise NodeError(
                f"What the node shows under {key!r} is {len(text)} characters; at most "
                f"{LARGEST_UI} are sent."
            )
        checked[str(key)] = json.loads(text)
    return checked


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The ui of several calls: lists one behind the other."""
    both = dict(one)
    for key, value in other.items():
        old = both.get(key)
        both[key] = [*old, *value] if isinstance(old, list) and isinstance(value, list) else value
    return both
