"""`Shard`: this rank's part of a tensor, wherever a backend keeps it, as boxes of the whole one.

The whole on `ddp`, some rows on FSDP2, columns or experts where a layer is split along another dimension. ZeRO's part, a run of
the flattened tensor, is up to 2n - 1 boxes of it (`boxes_of_run`) and not one of the flattened tensor: so a checkpoint has one
kind of coordinates, and any layout on any number of ranks reads what another wrote. It costs little: most runs end with a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from tritune.trainer.parallel.box import Box, boxes_of_run, runs_of_box


@dataclass(frozen=True)
class Part:
    """A box of a tensor and its elements.

    Attributes:
        values: of the box's sizes, contiguous; a view of the memory that trains.
    """

    offsets: tuple[int, ...]
    values: Tensor

    @property
    def box(self) -> Box:
        return Box(self.offsets, tuple(self.values.shape))


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a tensor of `shape`; no part where nothing falls to it."""

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @cached_property
    def _by_place(self) -> dict[tuple[int, ...], Part]:
        return {part.offsets: part for part in self.parts}

    def at(self, index: MetadataIndex) -> Tensor:
        """The values of the part that begins where torch's distributed checkpointing says."""
        return self._by_place[tuple(index.offset or ())].values

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Where the values lie, as torch's distributed checkpointing says it."""
        return [ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape) for part in self.parts]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """Asked by torch's distributed checkpointing (`torch.distributed._checkpointable`)."""
        items = []
        for part, chunk in zip(self.parts, self.chunks(), strict=True):
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(part.values), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, None, data))
        return items

    def flattened(self) -> Shard:
        """The same memory as boxes of the flattened tensor: checkpoints of formats 2 and 3 are read into it."""
        parts = []
        for part in self.parts:
            runs, flat, at = runs_of_box(self.shape, part.box), part.values.view(-1), 0
            for start, stop in runs:
                parts.append(Part((start,), flat[at : at + stop - start]))
                at += stop - start
        return Shard(torch.Size([math.prod(self.shape)]), self.dtype, tuple(parts))


def shard_of(tensor: Tensor) -> Shard:
    """The shard of a plain tensor, all of it, or of a DTensor that is split along dimensions, replicated, or both.

    Raises:
        ValueError: a layout in which a rank's elements are no single box, or are terms of a sum.
    """
    if not isinstance(tensor, DTensor):
        return Shard(tensor.shape, tensor.dtype, (_whole(tensor.detach()),) if tensor.numel() else ())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # With a `split_factor` a rank holds every so-manieth piece of a dimension.
    if not all(p.is_replicate() or (p.is_shard() and not hasattr(p, "split_factor")) for p in tensor.placements):
        raise ValueError(f"a tensor laid out as {tensor.placements} has no single box of elements on a rank")
    local = cast(DTensor, tensor.detach())._local_tensor
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.shape, tensor.dtype, (Part(tuple(offsets), local),) if local.numel() else ())


def shard_of_run(shape: torch.Size, start: int, values: Tensor) -> Shard:
    """The shard that holds a run of the flattened tensor.

    Args:
        start: the first element's number in it.
        values: 1-D view of the memory that trains; empty where nothing falls to this rank.
    """
    parts, at = [], 0
    for box in boxes_of_run(shape, start, start + values.numel()):
        size = math.prod(box.sizes)
        parts.append(Part(box.offsets, values[at : at + size].view(box.sizes)))
        at += size
    return Shard(shape, values.dtype, tuple(parts))


def fill(shards: dict[str, Shard], read: Callable[[str, Box], Tensor]) -> None:
    """Write `read(name, box)`, of the box's sizes, into each shard."""
    with torch.no_grad():
        for name, shard in shards.items():
            for part in shard.parts:
                part.values.copy_(read(name, part.box))


def _whole(tensor: Tensor) -> Part:
    return Part((0,) * tensor.ndim, tensor)
