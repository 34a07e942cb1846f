"""Run a convolutional network over a picture in horizontal strips, exactly.

Where a network only mixes neighbouring pixels (3x3 convolutions, norms per pixel, resampling), a
strip needs a few rows of its neighbours and nothing else. Cutting strips with a margin computes the
margins twice, in every layer. Here the strips come from top to bottom and every layer keeps the
last rows that it saw: nothing is computed twice but two rows of a convolution per strip, a layer's
output lags one row behind its input, and the last strip brings what is missing. The result is the
whole picture's, not close to it, as far as the convolution itself does not depend on the height.

A network writes its layers once, against `Whole`, and runs in strips when it gets a `Strip`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Add = Callable[[Tensor, Tensor], object]  # adds its second argument to the first one, in place
Rows = tuple[Tensor, bool]  # rows of a picture (B, C, rows, W); whether they are the last ones

# A single picture's convolution with fewer inputs than this is done by another kernel on the CPU,
# which adds in another order (`use_mkldnn` in torch's Convolution.cpp).
SMALL = 20480


class Whole:
    """Layers on a whole picture (B, C, H, W)."""

    def conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A 3x3 convolution that pads with one row and column of zeros."""
        return layer(x)

    def up(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Twice the side, by repeating pixels, then such a convolution."""
        return layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Half the side: a 3x3 convolution of stride 2 that reads zeros past right and bottom."""
        return layer(F.pad(x, (0, 1, 0, 1)))

    def join(self, key: Hashable, y: Tensor, x: Tensor, add: Add = Tensor.add_) -> Tensor:
        """Add x, or what `add` makes of it, to y, which comes from x by other layers."""
        add(y, x)
        return y


class Strip(Whole):
    """The same layers on a picture that comes in strips from top to bottom.

    Set `last` before the last one. Every strip must be higher than the layers lag behind.
    """

    def __init__(self) -> None:
        self.last = False
        self._kept: dict[Hashable, Tensor] = {}

    def _below(self, key: Hashable, x: Tensor) -> tuple[Tensor, int]:
        """`x` under the rows that were kept for `key`, and how many these are."""
        kept = self._kept.pop(key, None)
        return (x, 0) if kept is None else (torch.cat([kept, x], 2), kept.shape[2])

    def _keep(self, key: Hashable, rows: Tensor) -> None:
        if not self.last:
            self._kept[key] = rows.clone(memory_format=torch.preserve_format)

    def conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        x, above = self._below(layer, x)
        self._keep(layer, x[:, :, -2:])
        # Rows beside a cut were padded with zeros instead of their neighbours.
        return _crop(layer(x), above // 2, 0 if self.last else 1)

    def up(self, layer: nn.Module, x: Tensor) -> Tensor:
        x, above = self._below(layer, x)
        self._keep(layer, x[:, :, -2:])
        below = 0 if self.last else 1
        x = _crop(F.interpolate(x, scale_factor=2.0, mode="nearest"), above // 2, below)
        return _crop(layer(x), above // 2, below)

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        x, _ = self._below(layer, x)
        if self.last:
            return layer(F.pad(x, (0, 1, 0, 1)))
        rows = (x.shape[2] - 1) // 2
        self._keep(layer, x[:, :, 2 * rows :])
        return layer(F.pad(x[:, :, : 2 * rows + 1], (0, 1)))

    def join(self, key: Hashable, y: Tensor, x: Tensor, add: Add = Tensor.add_) -> Tensor:
        # Widths tell how many rows of y belong to one of x.
        rows = y.shape[2] * x.shape[3] // y.shape[3]
        if rows > y.shape[2]:
            x, _ = self._below(key, x)  # rows that make one together may come in two strips
            add(y, x[:, :, :rows])
            self._keep(key, x[:, :, rows:])
            return y
        kept = self._kept.pop(key, None)
        old, cut = 0, 0
        if kept is not None:
            old = kept.shape[2]
            assert old <= rows, "a strip must be higher than the layers lag behind"
            cut = old * y.shape[2] // rows
            add(y[:, :, :cut], kept)
        add(y[:, :, cut:], x[:, :, : rows - old])
        self._keep(key, x[:, :, rows - old :])
        return y


def _crop(x: Tensor, top: int, bottom: int) -> Tensor:
    return x[:, :, top : x.shape[2] - bottom]


@dataclass(frozen=True)
class Stage:
    """A part of a network that can run in strips."""

    run: Callable[[Tensor, Whole], Tensor]
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
    layers = Whole()
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
    layers = Strip()
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
