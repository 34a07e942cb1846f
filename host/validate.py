"""A prompt is judged before it is queued: every fault with its place, in ComfyUI's form.

Graph walks are loops, not recursion: the sender decides how deep a graph is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .library import Library
from .standin.dynamic import DynamicComboInput, Slot, nested, slots
from .standin.inputs import ComboInput

MOST_NODES = 20_000


class PromptError(ValueError):
    """A prompt that cannot be queued: `kind` is ComfyUI's name for the fault."""

    def __init__(self, kind: str, message: str, details: str = "", **extra: Any) -> None:
        super().__init__(message)
        self.body = {"type": kind, "message": message, "details": details, "extra_info": extra}


@dataclass
class Verdict:
    """What of a prompt can run, and what is wrong with the rest."""

    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)


def is_link(value: Any) -> bool:
    """Whether a value is a wire: [node id, number of the output]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def checked_shape(prompt: Any, library: Library) -> dict[str, Any]:
    """The prompt, if it is a graph of nodes that exist; PromptError with the node otherwise."""
    if not isinstance(prompt, dict) or not prompt:
        raise PromptError("no_prompt", "A prompt is a JSON object with at least one node.")
    if len(prompt) > MOST_NODES:
        raise PromptError("invalid_prompt", f"A prompt may have at most {MOST_NODES} nodes.")
    for node_id, node in prompt.items():
        place = f"Node ID '#{node_id}'"
        if not isinstance(node, dict):
            raise PromptError("invalid_prompt", "A node is a JSON object.", place)
        kind = node.get("class_type")
        title = (
            (node.get("_meta") or {}).get("title") if isinstance(node.get("_meta"), dict) else None
        )
        more = {"node_id": node_id, "class_type": kind, "node_title": title or kind}
        if not isinstance(kind, str):
            raise PromptError(
                "invalid_prompt", "A node needs the text 'class_type'.", place, **more
            )
        if kind not in library:
            raise PromptError(
                "missing_node_type", f"There is no node '{kind[:100]}' in this host.", place, **more
            )
        if not isinstance(node.get("inputs", {}), dict):
            raise PromptError("invalid_prompt", "'inputs' is a JSON object.", place, **more)
        # The page wraps a widget's list, so that it is not taken for a wire.
        node["inputs"] = {
            name: value["__value__"] if isinstance(value, dict) and "__value__" in value else value
            for name, value in node.get("inputs", {}).items()
        }
    return prompt


def judge(
    prompt: dict[str, Any], library: Library, targets: Iterable[str] | None = None
) -> Verdict:
    """Check all that the output nodes need; PromptError when none of them can run.

    `targets`: only these output nodes are wanted.
    """
    checked_shape(prompt, library)
    schemas = {kind: library[kind].schema() for kind in {n["class_type"] for n in prompt.values()}}
    wanted = None if targets is None else set(targets)
    ends = [
        node_id
        for node_id, node in prompt.items()
        if schemas[node["class_type"]].is_output_node and (wanted is None or node_id in wanted)
    ]
    if not ends:
        raise PromptError("prompt_no_outputs", "Prompt has no outputs")
    verdict = Verdict()
    known: dict[str, list[dict[str, Any]]] = {}
    for end in ends:
        needed, ring = ancestors(prompt, end)
        faulty = []
        for node_id in needed:
            if node_id not in known:
                known[node_id] = node_faults(prompt, node_id, schemas, library)
            if known[node_id]:
                faulty.append(node_id)
        if ring and not known[ring]:
            known[ring] = [fault("dependency_cycle", "Dependency cycle detected", "", None)]
            faulty.append(ring)
        for node_id in faulty:
            kind = prompt[node_id]["class_type"]
            entry = {"errors": known[node_id], "dependent_outputs": [], "class_type": kind}
            verdict.node_errors.setdefault(node_id, entry)["dependent_outputs"].append(end)
        if not faulty:
            verdict.outputs.append(end)
    return verdict


def ancestors(prompt: Mapping[str, Any], end: str) -> tuple[list[str], str | None]:
    """The nodes that `end` needs, itself last, and a node that needs itself if there is one."""
    order: list[str] = []
    state: dict[str, bool] = {}  # False: being walked, True: done
    ring = None
    stack: list[tuple[str, bool]] = [(end, False)]
    while stack:
        node_id, leave = stack.pop()
        if leave:
            state[node_id] = True
            order.append(node_id)
            continue
        if node_id in state:
            if state[node_id] is False:
                ring = node_id
            continue
        state[node_id] = False
        stack.append((node_id, True))
        for value in prompt[node_id]["inputs"].values():
            if is_link(value) and value[0] in prompt and state.get(value[0]) is not True:
                stack.append((value[0], False))
    return order, ring


def fault(kind: str, message: str, details: str, name: str | None, **extra: Any) -> dict[str, Any]:
    named = {"input_name": name} if name is not None else {}
    return {"type": kind, "message": message, "details": details, "extra_info": named | extra}


def node_faults(
    prompt: Mapping[str, Any], node_id: str, schemas: Mapping[str, Any], library: Library
) -> list[dict[str, Any]]:
    """What is wrong with a node's own inputs."""
    node = prompt[node_id]
    schema, values = schemas[node["class_type"]], node["inputs"]
    asked = validator_names(library[node["class_type"]].cls)
    faults: list[dict[str, Any]] = []
    try:
        expected = list(slots(schema.inputs, {k: v for k, v in values.items() if is_key(v)}))
        faults += unknown_dynamic(schema, expected, values)
        for slot in expected:
            faults += slot_faults(
                slot, values, prompt, schemas, slot.path.partition(".")[0] in asked
            )
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        faults.append(fault("exception_during_validation", str(error)[:300], "", None))
    return faults or own_faults(library[node["class_type"]].cls, schema, values, asked)


def is_key(value: Any) -> bool:
    return isinstance(value, str)


def unknown_dynamic(
    schema: Any, expected: list[Slot], values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Names below a growing or dynamic input that it has not: they would fail while running."""
    paths = {slot.path for slot in expected}
    heads = {entry.id for entry in schema.inputs}
    return [
        fault("invalid_input", f"There is no input '{name[:60]}'.", name[:60], name[:60])
        for name in values
        if "." in name and name not in paths and name.partition(".")[0] in heads
    ]


def slot_faults(
    slot: Slot, values: Mapping[str, Any], prompt: Mapping[str, Any], schemas: Any, custom: bool
) -> list[dict[str, Any]]:
    """What is wrong with one input; `custom`: the node judges its range itself."""
    name, config = slot.path, (slot.input.get_io_type(), slot.input.as_dict())
    if name not in values:
        # What the page never sends: a widget without a socket that shows results.
        shows = slot.input.options.get("socketless") and slot.input.default is None
        if not slot.required or shows:
            return []
        last = name.rpartition(".")[2]
        return [fault("required_input_missing", "Required input is missing", last, name)]
    value = values[name]
    if is_link(value):
        return link_faults(slot, value, prompt, schemas, config)
    if isinstance(value, list) and not slot.input.widget:
        message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        return [fault("bad_linked_input", message, name, name, received_value=short(value))]
    try:
        value = values[name] = typed(slot.input.get_io_type(), value)  # type: ignore[index]
    except (TypeError, ValueError, OverflowError):
        message = f"Failed to convert an input value to a {config[0]} value"
        details = f"{name}, {short(value)}"
        return [fault("invalid_input_type", message, details, name, received_value=short(value))]
    return [] if custom else range_faults(slot, value, config)


def typed(io_type: str, value: Any) -> Any:
    """A widget's value as its type; ValueError or TypeError when it is none."""
    if io_type == "INT":
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not a number")
        return int(value)
    if io_type == "FLOAT":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("not a number")
        return number
    if io_type == "STRING":
        if isinstance(value, dict | list):
            raise TypeError("not text")
        return value if isinstance(value, str) else str(value)
    return bool(value) if io_type == "BOOLEAN" else value


def range_faults(slot: Slot, value: Any, config: Any) -> list[dict[str, Any]]:
    """Values out of bounds, and choices that are none."""
    name, options, faults = slot.path, slot.input.options, []
    bounds = (
        ("min", "value_smaller_than_min", "smaller"),
        ("max", "value_bigger_than_max", "bigger"),
    )
    for bound, kind, word in bounds:
        limit = options.get(bound)
        if limit is None or not isinstance(value, int | float):
            continue
        if value < limit if bound == "min" else value > limit:
            message = f"Value {short(value)} {word} than {bound} of {limit}"
            faults.append(fault(kind, message, name, name, received_value=short(value)))
    if isinstance(slot.input, DynamicComboInput):
        choices: list[Any] | None = [option.key for option in slot.input.choices]
    else:
        choices = slot.input.choices if isinstance(slot.input, ComboInput) else None
    several = value if isinstance(value, list) else [value]
    if choices is not None and (wrong := [v for v in several if v not in choices]):
        shown = f"{name}: '{short(wrong[0])}' not in "
        shown += str(choices) if len(choices) < 20 else f"(list of length {len(choices)})"
        faults.append(
            fault(
                "value_not_in_list", "Value not in list", shown, name, received_value=short(value)
            )
        )
    return faults


def link_faults(
    slot: Slot, link: list[Any], prompt: Mapping[str, Any], schemas: Any, config: Any
) -> list[dict[str, Any]]:
    """A wire from nowhere, or of another type."""
    name, (source, number) = slot.path, link
    if source not in prompt:
        message = f"The wire comes from node '{source[:40]}', which is not in the prompt"
        return [fault("bad_linked_input", message, name, name, received_value=short(link))]
    outputs = schemas[prompt[source]["class_type"]].outputs
    if not 0 <= number < len(outputs):
        message = f"Node '{source[:40]}' has no output {short(number)}"
        return [fault("bad_linked_input", message, name, name, received_value=short(link))]
    sent, taken = outputs[number].io_type, config[0]
    free = ("*", "COMFY_MATCHTYPE_V3")
    if sent in free or taken in free or set(sent.split(",")) & set(taken.split(",")):
        return []
    details = f"{name}, received_type({sent}) mismatch input_type({taken})"
    message = "Return type mismatch between linked nodes"
    return [
        fault("return_type_mismatch", message, details, name, received_type=sent, linked_node=link)
    ]


def validator_names(cls: Any) -> set[str]:
    """The inputs that a node judges itself, by the signature of its validate_inputs."""
    judge_it = getattr(cls, "validate_inputs", None)
    return set(inspect.signature(judge_it).parameters) if judge_it else set()


def own_faults(
    cls: Any, schema: Any, values: Mapping[str, Any], asked: set[str]
) -> list[dict[str, Any]]:
    """What the node itself says of its constants; a wire's value is None here."""
    if not asked:
        return []
    live = {k: None if is_link(v) else v for k, v in values.items()}
    given = nested(schema.inputs, live)
    everything = "kwargs" in asked
    chosen = given if everything else {k: v for k, v in given.items() if k in asked}
    try:
        answer = cls.validate_inputs(**chosen)
    except BaseException as error:  # noqa: BLE001  a node may raise what it likes, SystemExit too
        return [fault("exception_during_validation", str(error)[:300], type(error).__name__, None)]
    if answer is True or answer is None:
        return []
    # The page shows `details`; every input that was judged gets the sentence, as in ComfyUI.
    details = str(answer) if answer is not False else "The node refuses this value."
    names = [name for name in chosen if not everything] or [None]
    message = "Custom validation failed for node"
    return [fault("custom_validation_failed", message, details, name) for name in names]


def short(value: Any) -> Any:
    """A value small enough for an answer."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    if isinstance(value, str | int | float | bool) or value is None:
        return value[:200] if isinstance(value, str) else value
    return f"a {type(value).__name__}"
