"""Run a convolutional network over a picture in horizontal strips, exactly.

Where a network only mixes neighbouring pixels (3x3 convolutions, norms per pixel, resampling), a
strip needs a few rows of its neighbours and nothing else. Cutting strips with a margin computes the
margins twice, in every layer. Here the strips come from top to bottom and every convolution keeps
the last rows that it read: nothing is computed twice, its output lags one row behind its input, and
the last strip brings what is missing. The result is the whole picture's, not close to it, as far as
the convolution itself does not depend on the height.

A network writes its layers once, against `Layers`; a whole picture is the first strip and the last.
Whatever a convolution reads is written below the rows kept, or the zeros of the edge, so that
nothing is copied to join them; convolutions themselves pad no rows (`PADDING`).

Where norms look at the whole picture, every layer must have done all strips before the next may
begin. `convolve` is for these: all strips of a layer are there, and it takes one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Add = Callable[[Tensor, Tensor], object]  # adds its second argument to the first one, in place
Write = Callable[[Tensor, Tensor], object]  # writes what it makes of the first to the second one
Rows = tuple[Tensor, bool]  # rows of a picture (B, C, rows, W); whether they are the last ones

PADDING = (0, 1)  # of 3x3 convolutions in strips: the rows of zeros come from here
# A single picture's convolution with fewer inputs than this is done by another kernel on the CPU,
# which adds in another order (`use_mkldnn` in torch's Convolution.cpp).
SMALL = 20480
BLOCK = 1 << 18  # values that go through several operations at once, to stay in a CPU's cache
SCORES = 1 << 28  # of attention that may be there at once


def blocks(x: Tensor) -> int:
    """How many rows of x to do at once where a few operations per value follow one another."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x.shape[2]
    return max(1, BLOCK // (len(x) * x.shape[1] * x.shape[3]))


def copied(x: Tensor, to: Tensor) -> None:
    to.copy_(x)


def doubled(x: Tensor, to: Tensor) -> None:
    """Pixels repeated over twice the columns, and over as many rows as `to` has."""
    h, w = x.shape[2:]
    to.unflatten(3, (w, 2)).unflatten(2, (h, -1)).copy_(x[:, :, :, None, :, None])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head (B, 1, pixels, width), in parts where there are too many scores: not
    every kernel goes without them."""
    rows = max(1, SCORES // k.shape[2])
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, 2)], 2)


class Layers:
    """Layers on a picture (B, C, H, W) that comes in strips from top to bottom.

    Set `last` before the last one; by default the first is. Every strip must be higher than the
    layers lag behind.
    """

    def __init__(self) -> None:
        self.last = True
        self._kept: dict[Hashable, Tensor] = {}

    def conv(self, layer: nn.Module, x: Tensor, write: Write = copied) -> Tensor:
        """A 3x3 convolution of x, or of what `write` makes of it, over an edge of one zero."""
        room, place = self._room(layer, x, x.shape[2:], above=1)
        _fill(place, x, write)
        self._keep(layer, room[:, :, -2:])
        return layer(room)

    def up(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Twice the side, by repeating pixels, then such a convolution."""
        h, w = x.shape[2:]
        room, place = self._room(layer, x, (2 * h, 2 * w), above=1)
        doubled(x, place)
        if self.last:
            return layer(room)
        self._keep(layer, room[:, :, -3:])
        return layer(room[:, :, :-1])  # always an even number of rows

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Half the side: a 3x3 convolution of stride 2 that reads zeros past right and bottom."""
        room, place = self._room(layer, x, x.shape[2:], above=0, right=1)
        place.copy_(x)
        if self.last:
            return layer(room)
        rows = (room.shape[2] - 1) // 2
        self._keep(layer, room[:, :, 2 * rows :])
        return layer(room[:, :, : 2 * rows + 1])

    def join(self, key: Hashable, y: Tensor, x: Tensor, add: Add = Tensor.add_) -> Tensor:
        """Add x, or what `add` makes of it, to y, which comes from x by other layers."""
        # Widths tell how many rows of y belong to one of x.
        rows = y.shape[2] * x.shape[3] // y.shape[3]
        kept = self._kept.pop(key, None)
        if rows > y.shape[2]:  # rows that make one together may come in two strips
            x = x if kept is None else torch.cat([kept, x], 2)
            add(y, x[:, :, :rows])
            self._keep(key, x[:, :, rows:])
            return y
        old, cut = 0, 0
        if kept is not None:
            old = kept.shape[2]
            assert old <= rows, "a strip must be higher than the layers lag behind"
            cut = old * y.shape[2] // rows
            add(y[:, :, :cut], kept)
        add(y[:, :, cut:], x[:, :, : rows - old])
        self._keep(key, x[:, :, rows - old :])
        return y

    def _room(
        self, key: Hashable, x: Tensor, size: Sequence[int], above: int, right: int = 0
    ) -> tuple[Tensor, Tensor]:
        """An empty picture, and the place in it for the next rows of `size` (rows, columns).

        Above that are the rows that were kept for `key`, or at the picture's top `above` rows of
        zeros; zeros too are `right` columns, and one row below the last strip.
        """
        kept = self._kept.pop(key, None)
        top = above if kept is None else kept.shape[2]
        room, place = _room(x, size, top, int(self.last), right)
        if kept is not None:
            room[:, :, :top] = kept
        return room, place

    def _keep(self, key: Hashable, rows: Tensor) -> None:
        if not self.last:
            self._kept[key] = rows.clone(memory_format=torch.preserve_format)


def _room(
    x: Tensor, size: Sequence[int], above: int, below: int, right: int
) -> tuple[Tensor, Tensor]:
    """An empty picture and the place of `size` (rows, columns) in it, with zeros around that."""
    rows, columns = size
    room = torch.empty(
        (*x.shape[:2], above + rows + below, columns + right),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    if above:
        room[:, :, :above] = 0
    if below:
        room[:, :, -below:] = 0
    if right:
        room[:, :, :, -right:] = 0
    return room, room[:, :, above : above + rows, :columns]


def _fill(place: Tensor, x: Tensor, write: Write, scale: int = 1) -> None:
    """Write x to the place, which has `scale` times its rows, in blocks."""
    rows = blocks(x)
    for top in range(0, x.shape[2], rows):
        write(x[:, :, top : top + rows], place[:, :, top * scale : (top + rows) * scale])


def convolve(
    strips: list[Tensor],
    layer: nn.Module,
    write: Write = copied,
    *,
    scale: int = 1,
    down: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A 3x3 convolution of a picture that is there in strips; takes them out of the list.

    Yields each strip and what becomes of it. `write` makes what the convolution reads: rows of
    `scale` times the width, `scale` of each or (beside a strip) one. With `down` the convolution
    has a stride of 2 and reads zeros past right and bottom; strips must then have even heights.
    """
    above: Tensor | None = None
    while strips:
        x = strips.pop(0)
        size = (x.shape[2] * scale, x.shape[3] * scale)
        room, place = _room(x, size, int(not down), 1, int(down))
        columns = slice(size[1])
        _fill(place, x, write, scale)
        if above is not None:
            write(above, room[:, :, :1, columns])
        if strips:
            write(strips[0][:, :, :1], room[:, :, -1:, columns])
        if not down:
            above = x[:, :, -1:].clone(memory_format=torch.preserve_format)
        done = [layer(room)]
        del room, place
        yield x, done.pop()


def cut(x: Tensor, count: int, least: int = 1, unit: int = 1) -> list[Tensor]:
    """x in at most `count` strips of about the same height, a multiple of `unit` rows; none has
    fewer rows than `least`."""
    units = x.shape[2] // unit
    count = max(1, min(count, x.shape[2] // (least + unit)))
    ends = [k * units // count * unit for k in range(1, count)]
    return list(torch.tensor_split(x, ends, dim=2))


def regrouped(strips: list[Tensor], count: int, least: int = 1) -> list[Tensor]:
    """The same picture in about `count` strips, each cut or some of them joined; empties the list.

    A strip is not cut into any of fewer rows than `least`.
    """
    done: list[Tensor] = []
    parts, size = round(count / len(strips)), round(len(strips) / count)
    while strips:
        if parts:
            done += cut(strips.pop(0), parts, least)
        else:
            done.append(torch.cat(strips[:size], 2))
            del strips[:size]
    return done


def joined(strips: Iterable[Tensor], height: int) -> Tensor:
    """The picture of `height` rows that strips make up."""
    return _collect(((x, False) for x in strips), height)


@dataclass(frozen=True)
class Stage:
    """A part of a network that can run in strips."""

    run: Callable[[Tensor, Layers], Tensor]
    scale: float  # side of its output, as a multiple of its input's
    lag: int  # input rows that it needs below an output row, at most
    work: int  # values per input pixel that are alive at its worst moment
    thin: int  # channels that its narrowest convolution reads


def work_of(stages: Sequence[Stage], x: Tensor) -> int:
    """Values that are alive at the worst moment of running the stages on all of x at once."""
    pixels, most = float(x.shape[0] * x.shape[2] * x.shape[3]), 0.0
    for stage in stages:
        most = max(most, stage.work * pixels)
        pixels *= stage.scale**2
    return int(most)


def run_whole(stages: Sequence[Stage], x: Tensor) -> Tensor:
    layers = Layers()
    for stage in stages:
        x = stage.run(x, layers)
    return x


def run_in_strips(stages: Sequence[Stage], x: Tensor, count: int) -> Tensor:
    """Run stages on about `count` strips of x (B, C, H, W); small stages on all of it."""
    batch, _, height, width = x.shape
    work = work_of(stages, x) / count
    strips: Iterable[Rows] = [(x, True)]
    for stage in stages:
        least = stage.lag + 2
        if x.device.type == "cpu" and batch == 1:
            least += SMALL // (stage.thin * width)
        rows = int(work / (stage.work * width * batch))
        if rows < height:
            # Lighter stages may take higher strips, so that their overheads count less, but what
            # they put out waits until the next stage has worked it off.
            rows = min(rows, 2 * height // count)
        strips = _through(stage, _regroup(strips, max(rows, 2 * least), least))
        height, width = int(height * stage.scale), int(width * stage.scale)
    return _collect(strips, height)


def _regroup(strips: Iterable[Rows], rows: int, least: int) -> Iterator[Rows]:
    """The same picture in equal strips of about `rows` rows, none below `least` (but if all is)."""
    held: Tensor | None = None
    for x, last in strips:
        held = x if held is None else torch.cat([held, x], 2)
        del x  # here and below: no name may keep rows alive while the next stage runs
        ready = held.shape[2] - (0 if last else least)  # the last strip must not be too low
        if ready < least and not last:
            continue
        for left in range(max(round(ready / rows), 1), 0, -1):
            high = -(-ready // left)
            piece, held, ready = held[:, :, :high], held[:, :, high:], ready - high
            yield piece, last and left == 1
            del piece
        held = held.clone(memory_format=torch.preserve_format)


def _through(stage: Stage, strips: Iterable[Rows]) -> Iterator[Rows]:
    """Run a stage over strips; what comes out is shifted up by its lag."""
    layers = Layers()
    for x, last in strips:
        layers.last = last
        done = [stage.run(x, layers)]
        del x
        yield done.pop(), last


def _collect(strips: Iterable[Rows], height: int) -> Tensor:
    """The picture of `height` rows that the strips make up."""
    out: Tensor | None = None
    row = 0
    for x, _ in strips:
        if out is None:
            b, c, _, w = x.shape
            out = torch.empty(
                (b, c, height, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
        out[:, :, row : row + x.shape[2]] = x
        row += x.shape[2]
    assert out is not None and row == height, (row, height)
    return out
