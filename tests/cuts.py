"""How tensors are cut between ranks, for tests of whatever saves and reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tritune.trainer.parallel.box import Box, boxes_of_run
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import Part, Shard

ALONE = World(0, 1, torch.device("cpu"))


def shard_at(tensor: torch.Tensor, boxes: list[Box]) -> Shard:
    """What a rank that holds these boxes has of a tensor."""
    parts = tuple(Part(box.offsets, tensor[box.slices].clone()) for box in boxes)
    return Shard(tensor.shape, tensor.dtype, parts)


def along(tensor: torch.Tensor, dimension: int, count: int) -> list[list[Box]]:
    """The box of each of `count` ranks, some of them smaller; one rank's where there is no such dimension."""
    if tensor.ndim <= dimension:
        return [[Box((0,) * tensor.ndim, tuple(tensor.shape))]]
    width, found = -(-tensor.shape[dimension] // count), []
    for start in range(0, tensor.shape[dimension], width):
        offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
        offsets[dimension], sizes[dimension] = start, min(width, tensor.shape[dimension] - start)
        found.append([Box(tuple(offsets), tuple(sizes))])
    return found


# Each gives the boxes of every rank.
LAYOUTS: dict[str, Callable[[torch.Tensor], list[list[Box]]]] = {
    "whole": lambda t: along(t, 0, 1),
    "along the first dimension": lambda t: along(t, 0, 2),
    "along the second, over three": lambda t: along(t, 1, 3),
    "in runs": lambda t: [boxes_of_run(t.shape, 0, 11), boxes_of_run(t.shape, 11, t.numel())],
}


def held_by(
    tensors: dict[str, torch.Tensor], layout: Callable[[torch.Tensor], list[list[Box]]]
) -> Iterator[dict[str, list[Box]]]:
    """Each rank's boxes of every tensor, by name."""
    ranks = {name: layout(tensor) for name, tensor in tensors.items()}
    for rank in range(max(map(len, ranks.values()))):
        yield {name: boxes[rank] if rank < len(boxes) else [] for name, boxes in ranks.items()}
