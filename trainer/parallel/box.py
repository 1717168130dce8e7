"""`Box`: a block of a tensor's elements, with a place and a size along each of its dimensions.

What a rank holds of a tensor is a list of boxes, whatever cut it: rows, columns, experts, or both at once. There is one kind
of coordinates, those of the tensor itself, so that any two parts are compared by the same few lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """`sizes` elements from `offsets` on, a number for each dimension of the tensor; none of them for a single number."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def within(self, index: int) -> Box:
        """The same elements of the tensor whose part `index` along a further, first dimension they are."""
        return Box((index, *self.offsets), (1, *self.sizes))


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements `start` to `stop` of the flattened tensor, as boxes that follow one another in that order.

    A run that begins and ends inside rows is three boxes of a matrix: what is left of one row, whole rows, the beginning of one.
    With n dimensions it is at most 2n - 1. Each box is one stretch of the run's memory.
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    width, inner = math.prod(shape[1:]), shape[1:]
    first, last = -(-start // width), stop // width  # the whole rows
    if first > last:  # all within one row
        return [box.within(last) for box in boxes_of_run(inner, start - last * width, stop - last * width)]
    head = boxes_of_run(inner, start - (first - 1) * width, width) if start < first * width else []
    rows = [Box((first, *(0 for _ in inner)), (last - first, *inner))] if first < last else []
    tail = boxes_of_run(inner, 0, stop - last * width)
    return [*(box.within(first - 1) for box in head), *rows, *(box.within(last) for box in tail)]


def runs_of_box(shape: Sequence[int], box: Box) -> list[tuple[int, int]]:
    """Where each run of a box's elements begins and ends in the flattened tensor, in their order.

    One run where the box ends with whole rows or is within one; one for each of its rows where it is some columns.
    """
    cut = next((d for d in reversed(range(len(shape))) if box.sizes[d] != shape[d]), 0)
    widths = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    length = math.prod(box.sizes[cut:])
    outer = [range(o, o + s) for o, s in zip(box.offsets[:cut], box.sizes[:cut], strict=True)]
    within = sum(o * w for o, w in zip(box.offsets[cut:], widths[cut:], strict=True))
    starts = (within + sum(i * w for i, w in zip(index, widths, strict=False)) for index in itertools.product(*outer))
    return [(start, start + length) for start in starts]


def first_fault(boxes: Sequence[Box], shape: Sequence[int]) -> tuple[tuple[int, ...], int] | None:
    """The first element of a tensor that is not in exactly one box, and in how many it is; None where there is none.

    Args:
        boxes: within `shape`, each of at least one element.
    """
    if not shape:
        return None if len(boxes) == 1 else ((), len(boxes))
    waiting = sorted(boxes, key=lambda box: box.offsets[0], reverse=True)
    cuts = sorted({0, shape[0], *(b.offsets[0] for b in boxes), *(b.offsets[0] + b.sizes[0] for b in boxes)})
    across: list[Box] = []  # those that hold some of the rows from one cut to the next: all of these rows, that is
    for at in cuts[:-1]:
        across = [box for box in across if box.offsets[0] + box.sizes[0] > at]
        while waiting and waiting[-1].offsets[0] == at:
            across.append(waiting.pop())
        fault = first_fault([Box(box.offsets[1:], box.sizes[1:]) for box in across], shape[1:])
        if fault is not None:
            return (at, *fault[0]), fault[1]
    return None
