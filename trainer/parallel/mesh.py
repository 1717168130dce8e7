"""`Mesh`: the processes of a run as a grid with named axes. It is made once, by `build`, and handed on.

Whoever sums says over which axes; nobody takes all processes for those that share a step's rows. `World` is for what truly
concerns all of them: a stop, an error, a barrier, a file that one of them writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tritune.trainer.config.backends import BackendConfig, FsdpConfig, HsdpConfig, ZeroConfig, hsdp_shards
from tritune.trainer.parallel.distributed import World, ensure_group

REPLICATE, SHARD = "replicate", "shard"
DATA = (REPLICATE, SHARD)


@dataclass(frozen=True)
class Mesh:
    """All processes as a grid.

    Along `replicate` ranks hold the same parts of the state, along `shard` each its own; the ranks of both see different rows
    of a step, and gradients are averaged over them. Ranks along any other axis (`cp`, `tp`) see the same rows.

    Attributes:
        axes: name and size of each, the outermost first: neighbours in rank are neighbours along the last. One that is not
            named here has the size 1.

    Raises:
        ValueError: the sizes do not multiply to the number of processes, or a name stands twice.
    """

    world: World
    axes: tuple[tuple[str, int], ...]
    _groups: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if math.prod(size for _, size in self.axes) != self.world.size or len(dict(self.axes)) != len(self.axes):
            raise ValueError(f"{self.world.size} processes are no grid of {self.axes}")

    def size(self, over: Sequence[str]) -> int:
        """How many ranks there are over these axes together."""
        return math.prod(size for name, size in self.axes if name in over)

    def rank(self, over: Sequence[str]) -> int:
        """This process's number among them."""
        number, inner = 0, self.world.size
        for name, size in self.axes:
            inner //= size
            if name in over:
                number = number * size + self.world.rank // inner % size
        return number

    def sum(self, x: Tensor, over: Sequence[str]) -> Tensor:
        """Sum `x` over the ranks of these axes; the same tensor on each of them."""
        if self.size(over) > 1:
            x = x.clone()
            dist.all_reduce(x, group=self.group(over))
        return x

    def group(self, over: Sequence[str]) -> Any:
        """The process group of this rank over these axes; None for all processes, through the default group.

        The first call for some axes is a collective of all processes.
        """
        if self.size(over) == self.world.size:
            return self.world.group
        names = tuple(name for name, _ in self.axes if name in over)
        if names not in self._groups:
            for ranks in self._ranks_over(names):
                group = dist.new_group(ranks)
                if self.world.rank in ranks:
                    self._groups[names] = group
        return self._groups[names]

    @cached_property
    def devices(self) -> DeviceMesh:
        """As torch's sharding takes it. The first use is a collective, and joins a process group where there is none."""
        ensure_group(self.world.device)
        names, sizes = zip(*self.axes, strict=True)
        return init_device_mesh(self.world.device.type, sizes, mesh_dim_names=names)

    @property
    def data_devices(self) -> DeviceMesh:
        """The part of `devices` over which parameters are sharded and replicated."""
        return self.devices[tuple(name for name, _ in self.axes if name in DATA)]

    def _ranks_over(self, names: Sequence[str]) -> list[list[int]]:
        """Which ranks are together over these axes, in every place of the others."""
        grid = torch.arange(self.world.size).view([size for _, size in self.axes])
        inner = [i for i, (name, _) in enumerate(self.axes) if name in names]
        outer = [i for i in range(len(self.axes)) if i not in inner]
        return grid.permute(outer + inner).reshape(-1, self.size(names)).tolist()


def make_mesh(config: BackendConfig, world: World) -> Mesh:
    """The grid of a backend: `fsdp` and ZeRO shard over all processes, `ddp` replicates, `hsdp` does both."""
    if isinstance(config, HsdpConfig) and world.size > 1:
        shards = hsdp_shards(config, world.size, world.local_size) or 1  # None was refused with the config
        return Mesh(world, ((REPLICATE, world.size // shards), (SHARD, shards)))
    if isinstance(config, FsdpConfig | ZeroConfig) or world.size == 1:
        return Mesh(world, ((SHARD, world.size),))
    return Mesh(world, ((REPLICATE, world.size), (SHARD, 1)))
