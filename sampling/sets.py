"""Pictures that belong together: one plan, one picture after the other, over one prefix.

Every picture has a prompt of its own and sees the same references. *independent*: nothing else.
*sequential*: also every finished picture before it, as a further reference, whose block the prefix
store appends to what it has. *joint*: all are painted at once and each sees all others, as far as
they are. A picture that fails does not take the finished ones with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import SamplingError
from .noise import image_seed
from .pipeline import Picture, Pipeline, Progress, Task
from .task import Member

MAX_PICTURES = 15  # references and pictures together, where pictures see each other
MAX_SET = 64
SEEING = ("independent", "sequential", "joint")
FAILURES = (RuntimeError, ValueError, MemoryError)  # cancelling is none of these

# "1. ", "2) ", "(3) ", "4: ", "5、", "Panel 6: ", "picture 7 - ", "图8：", at the start of a line.
ITEM = re.compile(
    r"^\s*(?:[-*]\s+)?(?:(?:panel|picture|image|page|scene|frame|第|图|图片|画面|分镜)\s*)?"
    r"[(（]?([0-9]{1,2})(?:\s*[张幅格页])?(?:[)）：、]\s*|[.:]\s+|\s+[-–—]\s+)(?=\S)",
    re.IGNORECASE,
)
WORDS = "two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {word: number for number, word in enumerate(WORDS, start=2)}
SIGNS = {sign: number for number, sign in enumerate("零一二三四五六七八九十")} | {"两": 2}
# Not "image 2 and image 3", "the third picture" (第三张) or "twenty-four panels".
SPOKEN = re.compile(
    rf"(?<![\w.,-])(?<!image )(?<!picture )(?<!panel )([0-9]{{1,2}}|{'|'.join(WORDS)})[ -]+"
    r"(?:(?!(?:and|or|of|in|on|to|from|with|the)\b)\w+[ -]+)?"
    r"(?:panels?|pictures?|images?|pages?|scenes?|frames?)\b"
    r"|(?<![第0-9一二两三四五六七八九十])([0-9]{1,2}|[一二两三四五六七八九十]{1,3})\s*"
    r"(?:张|幅|格|页|个画面|个分镜)",
    re.IGNORECASE,
)

T = TypeVar("T")


@dataclass(frozen=True)
class SetPlan:
    """What to make: a prompt and a seed for each picture, counted from 0; begin with `start`."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seeing: str = SEEING[0]
    start: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sequential(self) -> bool:
        return self.seeing == "sequential"

    @property
    def together(self) -> tuple[Member, ...]:
        """All of them, when they are painted at once."""
        if self.seeing != "joint":
            return ()
        pairs = zip(self.prompts, self.seeds, strict=True)
        return tuple(Member(prompt, seed, place) for place, (prompt, seed) in enumerate(pairs))


@dataclass(frozen=True)
class Failure:
    """Picture `index` could not be made; `error` says why. A set that hangs together ends here."""

    index: int
    error: Exception

    @property
    def text(self) -> str:
        words = (str(self.error) or type(self.error).__name__).splitlines()[0]
        return f"picture {self.index + 1} failed: {words.rstrip('.')}."


def prompts_of(text: str) -> list[str]:
    """A prompt for each picture: the items of a numbered list, else the lines.

    An item goes on until the next number. What stands before the first one holds for all.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbers = [ITEM.match(line) for line in lines]
    found = [int(number[1]) for number in numbers if number]
    if not found or found != list(range(found[0], found[0] + len(found))) or found[0] > 1:
        return lines
    common, items = "", []
    for line, number in zip(lines, numbers, strict=True):
        if number:
            items.append(line[number.end() :])
        elif items:
            items[-1] += f" {line}"
        else:
            common = f"{common} {line}".strip()
    return [f"{common} {item}".strip() for item in items]


def count_of(text: str) -> int:
    """How many pictures a prompt asks for: its list, else a number in words, else its lines."""
    prompts = prompts_of(text)
    spoken = SPOKEN.search(text)
    if len(prompts) != 1 or not spoken:
        return len(prompts)
    word = (spoken[1] or spoken[2]).lower()
    number = int(word) if word.isdigit() else NUMBERS.get(word) or _signs(word)
    return max(1, min(number, MAX_SET))


def _signs(word: str) -> int:
    """A Chinese number up to 99: 四 is 4, 十二 is 12, 二十 is 20, 二十四 is 24."""
    tens, ten, ones = word.rpartition("十")
    return (SIGNS.get(tens, 1) * 10 if ten else 0) + SIGNS.get(ones, 0)


def plan_set(
    text: str, count: int = 0, seeing: str = SEEING[0], *, seed: int = 0, same_seed: bool = False,
    references: int = 0, start: int = 0,
) -> SetPlan:  # fmt: skip
    """From what the user wrote. A `count` of 0 is what the prompt says; with fewer prompts than
    pictures they start over. Raises SamplingError for what cannot be made.
    """
    prompts = prompts_of(text)
    if not prompts:
        raise SamplingError("there is no prompt; write one line for each picture.")
    if seeing not in SEEING:
        raise SamplingError(
            f"pictures of a set cannot be painted '{seeing}' by this model; choose one of: "
            f"{', '.join(SEEING)}."
        )
    count = count or count_of(text)
    if not 1 <= count <= MAX_SET:
        raise SamplingError(f"a set has 1 to {MAX_SET} pictures, {count} were asked for.")
    if seeing != SEEING[0] and count + references > MAX_PICTURES:
        raise SamplingError(
            f"{references} references and {count} pictures that see each other are more than "
            f"{MAX_PICTURES}; make fewer, or let them see the references only."
        )
    if not 0 <= start < count:
        raise SamplingError(
            f"the set has {count} pictures and cannot begin with picture {start + 1}; choose one "
            f"of 1 to {count}."
        )
    if seeing == "joint" and start:
        raise SamplingError(
            "pictures that are painted at once cannot go on from finished ones; paint all of them, "
            "or choose sequential."
        )
    return SetPlan(
        prompts=tuple(prompts[k % len(prompts)] for k in range(count)),
        seeds=tuple(image_seed(seed, 0 if same_seed else k) for k in range(count)),
        seeing=seeing,
        start=start,
    )


def in_turn(
    plan: SetPlan,
    make: Callable[[int, Sequence[Tensor]], Iterator[T | Picture]],
    earlier: Sequence[Tensor] = (),
) -> Iterator[T | Picture | Failure]:
    """Everything that `make` yields for each picture; it is given what the picture sees.

    `earlier` are the finished pictures before `plan.start`, which a sequential set needs. The
    caller stops by asking for no more; what is done is done.
    """
    if plan.sequential and len(earlier) != plan.start:
        raise SamplingError(
            f"to go on with picture {plan.start + 1} of a set whose pictures see each other, the "
            f"{plan.start} before it are needed; {len(earlier)} were given."
        )
    seen = list(earlier) if plan.sequential else []
    for k in range(plan.start, len(plan)):
        try:
            for event in make(k, tuple(seen)):
                if isinstance(event, Picture) and plan.sequential:
                    seen.append(event.pixels)
                yield event
        except FAILURES as error:
            yield Failure(k, error)
            if plan.sequential:
                return


def run_set(
    pipeline: Pipeline, task: Task, plan: SetPlan, earlier: Sequence[Tensor] = ()
) -> Iterator[Progress | Picture | Failure]:
    """Make a set like `task`, whose prompt and seed are those of `plan`."""
    size = pipeline.plan(task).size  # of all: later ones see pictures of other shapes
    if plan.together:
        at_once = replace(task, together=plan.together, size=size)
        pipeline.plan(at_once)  # what cannot be is refused here, and is no failure of a picture
        return _at_once(pipeline, at_once)

    def make(k: int, before: Sequence[Tensor]) -> Iterator[Progress | Picture]:
        one = replace(
            task, prompt=plan.prompts[k], seed=plan.seeds[k], count=1, size=size,
            references=(*task.references, *before),
        )  # fmt: skip
        for event in pipeline.run(one):
            if isinstance(event, Progress):
                yield replace(event, image=k)
            else:
                yield replace(event, index=k)

    return in_turn(plan, make, earlier)


def _at_once(pipeline: Pipeline, task: Task) -> Iterator[Progress | Picture | Failure]:
    done = 0
    try:
        for event in pipeline.run(task):
            done += isinstance(event, Picture)
            yield event
    except FAILURES as error:
        yield Failure(done, error)


def contact_sheet(pictures: Sequence[Tensor], side: int = 512, gap: int = 8) -> Tensor:
    """All pictures (H, W, 3 or 4) small in a grid on white, row by row: one picture (H, W, 3).

    `side` is the longer side of the largest of them, on the sheet.
    """
    if not pictures:
        raise SamplingError("a contact sheet needs at least one picture.")
    scale = min(1.0, side / max(max(p.shape[:2]) for p in pictures))
    small = []
    for picture in pictures:
        rgb = picture[..., :3].float().cpu()
        if picture.shape[-1] == 4:
            alpha = picture[..., 3:].float().cpu()
            rgb = rgb * alpha + (1 - alpha)
        height, width = (max(1, round(length * scale)) for length in rgb.shape[:2])
        x = rgb.permute(2, 0, 1)[None]
        small.append(F.interpolate(x, (height, width), mode="area")[0].permute(1, 2, 0))
    columns = math.ceil(math.sqrt(len(small)))
    rows = math.ceil(len(small) / columns)
    height, width = (max(p.shape[axis] for p in small) for axis in (0, 1))
    sheet = torch.ones(rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    for k, picture in enumerate(small):
        top = gap + k // columns * (height + gap) + (height - picture.shape[0]) // 2
        left = gap + k % columns * (width + gap) + (width - picture.shape[1]) // 2
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet
