"""Made `format2/` and `format3/`, checkpoints whose tensors are stored as runs of their flattened elements.

    python tests/checkpoint/make_flat.py FOLDER

It runs with the code of then: the commit before b50dcb7 wrote format 2, c9b6c30 format 3; what is newer writes no such
checkpoint. Two ranks write what backends gave them: a run that ends inside a row (ZeRO), rows (FSDP2), and one number on both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

STEP, STATE = 7, {"train": {"step": 7}, "data": "0123", "kept": [1, 2.5, "three"]}
CUTS = {
    "model.w": 17,
    "optim.w.exp_avg_sq": 17,
    "model.rows": 36,
    "model.deep": 33,
    "model.half": 4,
}  # where rank 1 begins


def whole() -> dict[str, torch.Tensor]:
    """The tensors as they are over all ranks."""
    return {
        "model.w": torch.arange(35.0).view(7, 5) / 8,
        "optim.w.exp_avg_sq": torch.arange(35.0).view(7, 5) + 1,
        "optim.w.step": torch.tensor(7.0),
        "model.rows": torch.arange(60.0, dtype=torch.float64).view(5, 4, 3),
        "model.deep": -torch.arange(60.0).view(3, 4, 5),
        "model.half": torch.arange(9.0).to(torch.bfloat16),
    }


def save(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from tritune.trainer.checkpoint.store import CheckpointStore

    shard, world = _names_of_then()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meet", 2), rank=rank, world_size=2)
    tensors = {}
    for name, tensor in whole().items():
        cut, flat = CUTS.get(name, 0), tensor.view(-1)
        start, values = (0, flat) if not cut else ((cut, flat[cut:]) if rank else (0, flat[:cut]))
        tensors[name] = shard(tensor.shape, start, values.clone())
    CheckpointStore(Path(folder), 1, world(rank, 2, torch.device("cpu")), print).save(STEP, tensors, STATE, None)
    dist.destroy_process_group()


def _names_of_then() -> tuple[Any, Any]:
    try:
        from tritune.trainer.parallel.distributed import World
        from tritune.trainer.parallel.shard import Shard
    except ImportError:
        from tritune.trainer.distributed import World  # type: ignore[no-redef]
        from tritune.trainer.piece import Piece as Shard  # type: ignore[no-redef]
    return Shard, World


if __name__ == "__main__":
    torch.multiprocessing.spawn(save, (sys.argv[1],), nprocs=2)
