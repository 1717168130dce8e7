"""Saving while training goes on: a copy of the state in host memory, and one thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import Part, Shard


class Background:
    """Runs one save at a time. The copy's memory is taken at the first save and kept: this rank's part once more.

    Args:
        world: the ranks; the writer's collectives run over a group of their own.
    """

    def __init__(self, world: World) -> None:
        self.world = world.apart()
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}  # by name and place
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, save: Callable[[World, dict[str, Shard]], None], tensors: dict[str, Shard]) -> None:
        """Copy `tensors`, then call `save(world, copies)` in the thread. Waits for the save before it.

        Raises:
            CheckpointError: the save before it failed.
        """
        self.wait()
        copies = {name: self._copy(name, shard) for name, shard in tensors.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, args=(save, copies), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the save is done.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, save: Callable[[World, dict[str, Shard]], None], copies: dict[str, Shard]) -> None:
        try:
            save(self.world, copies)
        except Exception as error:  # noqa: BLE001  kept for the thread that trains, which raises it at its next save
            self._error = error

    def _copy(self, name: str, shard: Shard) -> Shard:
        parts = []
        for part in shard.parts:
            place, values = (name, part.offsets), part.values
            kept = self._copies.get(place)
            if kept is None or kept.shape != values.shape:
                kept = self._copies[place] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            parts.append(Part(part.offsets, kept.copy_(values, non_blocking=True)))
        return replace(shard, parts=tuple(parts))
