"""Tensors to and from sharded safetensors, through torch DCP's planning: any number of ranks writes, any other reads."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from tritune.trainer.errors import CheckpointError
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import Shard


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        values = self.state_dict[index.fqn].at(index)
        # The parameters of one ZeRO group have one step, and safetensors refuses names that share memory.
        return values.clone() if values.numel() == 1 else values


class _Writer(HuggingFaceStorageWriter):
    """DCP's, but for the writing: its own builds a rank's whole file in memory first, holding the interpreter's lock.

    A file has one place for each name, so that the second boxes of a rank are in a second file, and so on: then every file is
    one that DCP's own reader reads.

    Attributes:
        names: of the files that were written.
    """

    names: list[str]

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        self.names = []
        for number, items in enumerate(_files_of(plan.items)):
            tensors = {item.index.fqn: planner.resolve_data(item).cpu().contiguous() for item in items}  # type: ignore[union-attr]
            offsets = {i.index.fqn: {"saved_offsets": list(i.index.offset or ())} for i in items}
            about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            self.names.append(_file(plan.storage_data["shard_index"], number))
            save_file(tensors, Path(self.path) / self.names[-1], about)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written


def _files_of(items: list[WriteItem]) -> list[list[WriteItem]]:
    """What goes into each file: the first box of every tensor, the second of those that have one, and so on."""
    by_name: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        by_name[item.index.fqn].append(item)
    most = max(map(len, by_name.values()), default=0)
    return [[found[i] for found in by_name.values() if len(found) > i] for i in range(most)]


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        stored: Any = self.metadata.state_dict_metadata  # type: ignore[union-attr]
        chunks = {name: shard.chunks() for name, shard in self.state_dict.items()}
        return LoadPlan([i for n, c in chunks.items() for i in create_read_items_for_chunk_list(n, stored[n], c)])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index)


def save_tensors(directory: Path, tensors: dict[str, Shard], world: World) -> list[str]:
    """Write every rank's boxes, each once where several ranks hold it; return the names of the files that this rank wrote.

    Raises:
        TypeError: a value is no shard. DCP's safetensors storage would save it without a word, unreadable.
    """
    for name, value in tensors.items():
        if not isinstance(value, Shard):
            raise TypeError(f"{name} is a {type(value).__name__}; only shards of tensors are written here")
    writer, alone = _Writer(str(directory), save_distributed=True), world.size == 1
    with _plain_errors():
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=_SavePlanner(False, False),
            no_dist=alone,
            process_group=world.group,
        )
    return writer.names  # a small state may leave a rank nothing to write


def load_tensors(
    directory: Path, tensors: dict[str, Shard], expected: dict[str, Any], world: World, flat: bool = False
) -> None:
    """Read into `tensors` in place; of each file only what lies in this rank's boxes.

    Args:
        expected: the manifest's tensors, name -> shape and dtype.
        flat: whether they are stored as runs of their flattened elements (`is_flat` of the manifest).

    Raises:
        CheckpointError: names, shapes or dtypes are not the run's, or values such as no run has. DCP would ignore extra names
            and cast dtypes.
    """
    require_same_tensors(directory, tensors, expected)
    reader, alone = HuggingFaceStorageReader(str(directory)), world.size == 1
    places = {name: shard.flattened() for name, shard in tensors.items()} if flat else dict(tensors)
    with torch.no_grad(), _plain_errors():
        dcp.load(
            places,
            storage_reader=reader,
            planner=_LoadPlanner(),
            no_dist=alone,
            process_group=world.group,
        )

    for name, shard in tensors.items():
        for part in shard.parts:
            require_possible(directory, name, part.values)


def require_same_tensors(directory: Path, tensors: dict[str, Shard], expected: dict[str, Any]) -> None:
    """Compare names, shapes and dtypes with the manifest's; shards of meta tensors are fine.

    Raises:
        CheckpointError: they are not the run's.
    """
    missing, extra = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
    if missing or extra:
        raise CheckpointError(
            f"{directory}: it holds other tensors than this run: {len(missing)} missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}"
        )
    for name, value in tensors.items():
        shape, dtype = expected[name]["shape"], expected[name]["dtype"]
        if list(value.shape) != shape or str(value.dtype) != dtype:
            raise CheckpointError(
                f"{directory}: {name} is {dtype} {shape} there and {value.dtype} {list(value.shape)} in this run"
            )


def require_possible(directory: Path, name: str, values: Tensor) -> None:
    """A step whose gradients are not finite is not applied, so that weights and moments stay numbers, and squares positive."""
    if not values.is_floating_point() or not values.numel():
        return
    least, most = values.aminmax()  # a NaN is both; `isfinite` makes copies of the tensor on its way
    if not (least.isfinite() and most.isfinite()):
        raise CheckpointError(f"{directory}: {name} has values that are not finite")
    if name.endswith("exp_avg_sq") and least < 0:
        raise CheckpointError(f"{directory}: {name} is a mean of squares, and has values below 0")


def _file(rank: int, number: int) -> str:
    return f"shard-{rank:05d}{f'-{number + 1}' if number else ''}.safetensors"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn DCP's `CheckpointException`, which is no `Exception`, into ours; silence its remark that one process is one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
        raise CheckpointError(reasons) from error


def describe_tensors(tensors: dict[str, Shard]) -> dict[str, Any]:
    return {name: {"shape": list(shard.shape), "dtype": str(shard.dtype)} for name, shard in tensors.items()}
