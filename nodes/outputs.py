"""Pictures that belong together.

The node only plans. It unfolds into a node for each picture (`set_parts.py`), with core's own Save
or Preview Image behind each: so the host itself saves, shows and remembers every picture when it is
done, keeps them when the run is stopped, and makes only what is missing when it is queued again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.sets import MAX_SET, SetPlan, plan_set
from .kept import cache_input
from .references import ReferenceList, References
from .runtime import runtime, where
from .sampling import knobs, seed_input

SEEING = {
    "references only": "independent",
    "the pictures before it": "sequential",
    "each other, all at once": "joint",
}
SEEDS = ["each its own", "the same"]


class SeedlingImageSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingImageSet",
            display_name="Image Set",
            category="Seedling",
            description="Paints several pictures that belong together: a prompt each, the same "
            "references for all.",
            search_aliases=["batch", "story", "sequence", "grid", "组图", "批量"],
            hidden=[io.Hidden.dynprompt],
            is_output_node=True,
            enable_expand=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load DiT."),
                io.Clip.Input("clip", tooltip="From Load VLM Encoder."),
                io.Vae.Input("vae", tooltip="From Load VAE."),
                io.Latent.Input("latent", tooltip="The size of every picture, from Canvas Size."),
                *prompt_inputs(),
                seed_input(),
                *knobs(),
                io.Combo.Input(
                    "seeing",
                    options=[*SEEING],
                    default=[*SEEING][0],
                    tooltip="What each picture sees. The pictures before it: every finished one "
                    "becomes a further reference, which keeps figures alike and takes longer. Each "
                    "other: all are painted at once; your model has to know this.",
                ),
                io.Combo.Input(
                    "output",
                    options=["list", "batch"],
                    default="list",
                    tooltip="list: for nodes that handle each alone. batch: all at once.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="What to steer away from. It counts only when guidance is not 1.",
                ),
                ReferenceList.Input(
                    "references", optional=True, tooltip="From References; every picture sees them."
                ),
                *more_inputs(),
                cache_input(),
                io.String.Input(
                    "save_as",
                    default="set",
                    optional=True,
                    tooltip="Each picture is saved in the output folder under this name as soon as "
                    "it is done. Empty: it is only shown; connect Save Image to images.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images", "images", is_output_list=True, tooltip="The pictures, in order."
                ),
                io.Image.Output(
                    "sheet", "sheet", tooltip="All of them small in a grid: a contact sheet."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], references: References | None = None,
        earlier: Tensor | None = None, **widgets: Any,
    ) -> io.NodeOutput:  # fmt: skip
        plan = plan_set(
            widgets["prompts"],
            widgets["count"],
            SEEING[widgets["seeing"]],
            seed=widgets["seed"],
            same_seed=widgets.get("seeds") == SEEDS[1],
            references=len(references.items) if references else 0,
            start=widgets.get("start", 1) - 1,
        )
        given = 0 if earlier is None else len(earlier)
        if plan.sequential and given != plan.start:
            raise SamplingError(
                f"to go on with picture {plan.start + 1} of a set whose pictures see each other, "
                f"the {plan.start} before it are needed; {given} were given."
            )
        node, call = where()
        runtime().tell(f"{len(plan)} pictures, seeds from {widgets['seed']}")
        inputs = cls.hidden.dynprompt.get_node(node)["inputs"]
        nodes, end = unfolded(plan, inputs, widgets, f"{node}.{call}", call)
        return io.NodeOutput([end, 0], [end, 1], expand=nodes)


def prompt_inputs() -> list[Any]:
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            dynamic_prompts=True,
            placeholder="one prompt a line, or a numbered list",
            tooltip="One prompt a line, or a numbered list, whose items may have several "
            "lines; what stands before its first item holds for all. With fewer prompts "
            "than pictures they start over.",
        ),
        io.Int.Input(
            "count",
            default=0,
            min=0,
            max=MAX_SET,
            tooltip="How many pictures. 0: one for each prompt, or as many as a single "
            "prompt says (four panels, 四格).",
        ),
    ]


def more_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "seeds",
            options=SEEDS,
            default=SEEDS[0],
            optional=True,
            advanced=True,
            tooltip="each its own: picture k has seed + k. the same: all begin with the same "
            "noise, which keeps layouts alike.",
        ),
        io.Int.Input(
            "start",
            default=1,
            min=1,
            max=MAX_SET,
            optional=True,
            advanced=True,
            tooltip="Begin with this picture: to go on where a set was stopped, or failed.",
        ),
        io.Image.Input(
            "earlier",
            optional=True,
            tooltip="The finished pictures before start, in order, as a batch: those of another "
            "day. They come out again in front; pictures that see those before them need them.",
        ),
    ]


Graph = dict[str, dict[str, Any]]
WIRES = ("model", "clip", "vae", "latent", "references")
SAME = ("negative", "steps", "guidance", "sampler", "cache")  # widgets that all pictures share


def unfolded(
    plan: SetPlan, inputs: Mapping[str, Any], widgets: Mapping[str, Any], name: str, call: int
) -> tuple[Graph, str]:
    """The nodes of a set in the order of their run, and the id of the one that has them all.

    `inputs` are the set's own, with its wires; `name` is in front of every id. Wires, not values:
    a host knows by them what it has made already. `call` says which item of wired lists is meant.
    """
    wires = {key: inputs[key] for key in WIRES if key in inputs}
    same = {key: widgets[key] for key in SAME if key in widgets}
    before = {"earlier": inputs["earlier"]} if "earlier" in inputs else {}
    if plan.together:
        members = json.dumps([[one.prompt, one.seed] for one in plan.together])
        end = f"{name}.all"
        own = {"members": members, "output": widgets["output"], "call": call}
        picture = {"class_type": "SeedlingSetAtOnce", "inputs": wires | same | own}
        save_as = str(widgets.get("save_as", "")).strip()
        return {end: picture, f"{end}.shown": shown([end, 2], save_as)}, end
    nodes: Graph = {}
    done: dict[str, list[Any]] = {}  # the pictures so far: their places, and their wires
    for k in range(plan.start, len(plan)):
        own = {"prompt": plan.prompts[k], "seed": plan.seeds[k], "call": call}
        own |= {"number": k + 1, "count": len(plan)}
        seen = before | {f"before.{key}": wire for key, wire in done.items()}
        picture = f"{name}.{k + 1}"
        nodes[picture] = {
            "class_type": "SeedlingSetPicture",
            "inputs": wires | same | own | (seen if plan.sequential else {}),
        }
        done[f"picture_{k + 1}"] = [picture, 0]
        nodes[f"{picture}.shown"] = shown([picture, 0], str(widgets.get("save_as", "")).strip())
    together = {f"pictures.{key}": wire for key, wire in done.items()}
    end = f"{name}.all"
    more = {"output": widgets["output"], "call": call}
    nodes[end] = {"class_type": "SeedlingSetPictures", "inputs": before | together | more}
    return nodes, end


def shown(wire: list[Any], save_as: str) -> dict[str, Any]:
    """Core's node that saves a picture, or that shows it when it has no name to be saved under."""
    if not save_as:
        return {"class_type": "PreviewImage", "inputs": {"images": wire}}
    return {"class_type": "SaveImage", "inputs": {"images": wire, "filename_prefix": save_as}}
