"""Ranks: how they start, agree on failures, and end."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tritune.trainer.config.backends import BackendConfig, Device
from tritune.trainer.errors import DamagedRows, InputError, PeerError, of_panic

BARRIER_SECONDS = 0.05  # between looks whether all ranks have come


@dataclass(frozen=True)
class World:
    """The processes of a run. `size` 1 needs no process group: every collective here is then the identity.

    Attributes:
        local_size: how many of them share this machine.
        group: None for all, through the default group.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    group: Any = None

    def max(self, flag: int) -> int:
        """The largest `flag` of all ranks, over CPU tensors: no device waits for it."""
        if self.size == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.int64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def apart(self) -> World:
        """The same ranks over a group of their own, so that another thread's collectives never meet this one's."""
        if self.size == 1:
            return self
        return replace(self, device=torch.device("cpu"), group=dist.new_group(backend="gloo"))

    def barrier(self, name: str, beat: Callable[[], None]) -> None:
        """Wait until every rank has come to `name`, however long it takes; no collective is open meanwhile.

        For work that one rank of a machine does for the others, such as tokenizing: a collective would run into its time limit.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()  # as torch's own barriers do
        store.set(f"tritune/{name}/{self.rank}", "here")
        while not store.check([f"tritune/{name}/{rank}" for rank in range(self.size)]):
            beat()
            time.sleep(BARRIER_SECONDS)

    @contextmanager
    def raise_on_all(self, doing: str, patiently: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a block on all ranks; if it fails on one, fail on all, before the next collective can hang.

        The lowest failing rank raises its own exception and the others a `PeerError` that names it.

        Args:
            patiently: wait for the others without a time limit, calling this again and again.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  reported to every rank, then raised again
            error = caught
        except BaseException as caught:  # noqa: BLE001  what is no panic of a library is raised at once
            error = of_panic(caught)
        if patiently is not None:
            self.barrier(doing, patiently)
        failures = [(r, e) for r, e in enumerate(self.gather(None if error is None else _portable(error))) if e]
        if not failures:
            return
        first, message = failures[0]
        if error is not None and first == self.rank:
            raise error
        raise PeerError(f"rank {first} failed while {doing}: {message}") from error


def _portable(error: Exception) -> str:
    """What the others are told; by `InputError` they know that the fault is the user's, and end with the same status."""
    users = isinstance(error, InputError) and not isinstance(error, DamagedRows)
    name = InputError.__name__ if users else type(error).__name__
    return f"{name}: {error}"


def start(config: BackendConfig, deterministic: bool) -> World:
    """Join the processes that torchrun started (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`), or be alone without them.

    Args:
        deterministic: refuse GPU kernels that sum in an order of their own, so that a restart is bit for bit there too.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a write per tensor
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise InputError("backend.device=cuda", "this machine has no usable GPU", "Use backend.device=cpu or auto")
    use_cuda = config.device is not Device.cpu and torch.cuda.is_available()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if use_cuda and local_size > torch.cuda.device_count():  # seen alike by every process of the machine
        rule = f"the machine has {torch.cuda.device_count()} GPU(s), and each process needs its own"
        raise InputError(f"launch.num_procs={local_size}", rule, "Start at most one process per GPU")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed, wherever it is imported, warns of a missing GPU
        # Once a loss is small, moments and gradients fall below the normal range, where CPU arithmetic is many times slower.
        torch.set_flush_denormal(True)
    if size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            timeout=timedelta(seconds=config.timeout_seconds),
        )
    return World(rank, size, device, local_size)


def ensure_group(device: torch.device) -> None:
    """Join a process group of one where there is none: sharding engines want one even then."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


_ended: list[Any] = []


def end() -> None:
    """Leave the process group; safe to call where none was joined.

    A reference to the group is kept: were DDP's reducer its last owner, the group would be torn down under the
    interpreter's lock, which its own threads may be waiting for (seen here with gloo: 1 of 10 runs hung at the end).
    """
    if dist.is_initialized():
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def seed_forward(seed: int, step: int, micro_batch: int) -> None:
    """Seed PyTorch's generators for one forward: dropout inside the model is then the same on any rank and after a resume."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB + 1) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    torch.manual_seed((x ^ (x >> 31)) >> 1)


def generator_digest(device: torch.device) -> str:
    """Checksum of the state of the generator that drew the last masks; equal where the same forwards ran before it."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return f"{zlib.crc32(state.numpy().tobytes()):08x}"
