"""`Shard`: this rank's part of a tensor, wherever a backend keeps it.

Every backend's part is one run of the flattened tensor's elements: the whole on `ddp`, some rows on FSDP2, a range that may
begin inside a row on ZeRO. So a checkpoint stores flat runs, and any backend on any number of ranks reads what another wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """Elements `start` to `start + len(values)` of a tensor of `shape`, flattened.

    Attributes:
        values: 1-D view of the memory that trains; empty where nothing falls to this rank.
    """

    shape: torch.Size
    start: int
    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Where the values lie, as torch's distributed checkpointing says it."""
        size = self.values.numel()
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([size]))] if size else []

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """Asked by torch's distributed checkpointing (`torch.distributed._checkpointable`)."""
        properties, size = TensorProperties.create_from_tensor(self.values), torch.Size([math.prod(self.shape)])
        return [
            WriteItem(MetadataIndex(fqn, c.offsets), WriteItemType.SHARD, None, TensorWriteData(c, properties, size))
            for c in self.chunks()
        ]


def shard_of(tensor: Tensor) -> Shard:
    """The shard of a plain tensor, all of it, or of a DTensor that is sharded over rows, replicated, or both.

    Raises:
        ValueError: a layout in which a rank's elements are no single run.
    """
    if not isinstance(tensor, DTensor):
        return Shard(tensor.shape, 0, tensor.detach().view(-1))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        raise ValueError(f"a tensor laid out as {tensor.placements} has no single run of elements on a rank")
    local = cast(DTensor, tensor.detach())._local_tensor.view(-1)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    width = math.prod(tensor.shape[1:])
    return Shard(tensor.shape, offset[0] * width if tensor.ndim and local.numel() else 0, local)


def fill(shards: dict[str, Shard], read: Callable[[str, int, int], Tensor]) -> None:
    """Write `read(name, start, stop)`, 1-D, into each shard."""
    with torch.no_grad():
        for name, shard in shards.items():
            if shard.values.numel():
                shard.values.copy_(read(name, shard.start, shard.stop))
