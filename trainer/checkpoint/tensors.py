"""Tensors to and from sharded safetensors, through torch DCP's planning: any number of ranks writes, any other reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from tritune.trainer.distributed import World
from tritune.trainer.errors import CheckpointError


def save_tensors(directory: Path, tensors: dict[str, Tensor], world: World) -> list[str]:
    """Write every rank's part; return the names of the files that this rank wrote.

    Raises:
        TypeError: a value is no tensor. DCP's safetensors storage would save it without a word, unreadable.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; only tensors are written here")
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _plain_errors():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    prefix = f"shard-{world.rank + 1:05d}-"
    return sorted(p.name for p in directory.iterdir() if p.name.startswith(prefix))


def load_tensors(directory: Path, tensors: dict[str, Tensor], expected: dict[str, Any], world: World) -> None:
    """Read into `tensors` in place.

    Args:
        expected: the manifest's tensors, name -> shape and dtype.

    Raises:
        CheckpointError: names, shapes or dtypes are not the run's. DCP would ignore extra names and cast dtypes.
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
    with torch.no_grad(), _plain_errors():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=world.size == 1)


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


def describe_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
