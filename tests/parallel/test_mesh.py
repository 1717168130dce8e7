"""The grid of processes: sums over named axes, and runs on one that has further axes of size 1."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import harness
import numpy as np
import pytest
import torch
import torch.distributed as dist
from saved import figures
from tritune.launch import processes
from tritune.trainer.backends import make_backend
from tritune.trainer.config.backends import BackendConfig, FsdpConfig, HsdpConfig, ZeroConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.mesh import DATA, Mesh, make_mesh
from tritune.trainer.verify.compare import bit_equal

GRID = (("replicate", 2), ("cp", 1), ("shard", 1), ("tp", 2))  # `shard` is not the last one, `tp` is
OVER = [names for n in range(1, 4) for names in itertools.combinations(dict(GRID), n)]


def of(rank: int, size: int, axes: tuple[tuple[str, int], ...], local_size: int = 1) -> Mesh:
    return Mesh(World(rank, size, torch.device("cpu"), local_size), axes)


def together(axes: tuple[tuple[str, int], ...], rank: int, over: tuple[str, ...]) -> list[int]:
    """The ranks that differ from `rank` in nothing but their places along `over`, by numpy's own grid."""
    sizes = [size for _, size in axes]
    place = np.unravel_index(rank, sizes)
    cut = tuple(slice(None) if name in over else place[i] for i, (name, _) in enumerate(axes))
    return np.arange(np.prod(sizes)).reshape(sizes)[cut].ravel().tolist()


@pytest.mark.parametrize(
    "axes", [GRID, (("replicate", 2), ("shard", 3), ("cp", 2), ("tp", 2)), (("tp", 2), ("shard", 3))]
)
def test_ranks_are_counted_along_the_axes_that_are_named(axes):
    size = int(np.prod([n for _, n in axes]))
    for over, rank in itertools.product((*OVER, DATA, ("absent",)), range(size)):
        mesh, expected = of(rank, size, axes), together(axes, rank, over)
        assert mesh.size(over) == len(expected)
        assert expected[mesh.rank(over)] == rank


@pytest.mark.parametrize("axes", [(("shard", 3),), (("shard", 2), ("tp", 3)), (("shard", 2), ("shard", 2))])
def test_what_is_no_grid_of_the_processes_is_refused(axes):
    with pytest.raises(ValueError, match="4 processes are no grid"):
        of(0, 4, axes)


def test_the_grid_of_each_backend():
    world = World(0, 4, torch.device("cpu"), 2)
    assert make_mesh(BackendConfig(), world).axes == (("replicate", 4), ("shard", 1))
    assert make_mesh(HsdpConfig(), world).axes == (("replicate", 2), ("shard", 2))
    assert make_mesh(HsdpConfig(shards=4), world).axes == (("replicate", 1), ("shard", 4))
    assert {make_mesh(c, world).axes for c in (FsdpConfig(), ZeroConfig())} == {(("shard", 4),)}
    alone = World(0, 1, torch.device("cpu"))
    assert {make_mesh(c, alone).axes for c in (BackendConfig(), FsdpConfig(), HsdpConfig())} == {(("shard", 1),)}


def test_zero_does_not_average_over_ranks_that_see_the_same_rows():
    with pytest.raises(ValueError, match="zero3 averages gradients over all processes"):
        make_backend(ZeroConfig(), of(0, 4, GRID), Dtype.float32)


def summing_rank(number: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=number, world_size=4)
    try:
        mesh = of(number, 4, GRID)
        for over in (*OVER, *OVER):
            total = mesh.sum(torch.tensor(10.0**number), over)
            assert float(total) == sum(10.0**r for r in together(GRID, number, over)), over
        assert all(mesh.group(over) is mesh.group(over) for over in OVER if mesh.size(over) > 1), "each is made once"
        for name, size in GRID:
            assert (mesh.devices[name].size(), mesh.devices[name].get_local_rank()) == (size, mesh.rank((name,))), name
        assert mesh.data_devices.mesh.tolist() == [[number % 2], [number % 2 + 2]]
        assert mesh.devices is mesh.devices
    finally:
        dist.destroy_process_group()


def test_sums_run_over_the_axes_that_are_named(tmp_path):
    # A fork of this process would have its process group, where another test left one.
    torch.multiprocessing.start_processes(summing_rank, (str(tmp_path / "store"),), nprocs=4, start_method="forkserver")


# -- whole runs

RUNS = {  # ZeRO last: DeepSpeed keeps the process group of its first engine
    "ddp": "float32", "fsdp": "float32", "hsdp": "float32", "ddp bf16": "bfloat16", "hsdp bf16": "bfloat16", "zero2": "float32",
}  # fmt: skip
STEPS, SAVED = 4, 2
_rank = processes._rank


def rank_with_more_axes(*args) -> None:
    """A rank whose mesh has a context-parallel and a tensor-parallel axis, each of size 1."""
    from tritune.trainer import build

    made = build.make_mesh

    def more(config, world):
        mesh = made(config, world)
        print("axes", json.dumps(mesh.axes), "and cp, tp")
        return replace(mesh, axes=(*mesh.axes, ("cp", 1), ("tp", 1)), _groups={})

    build.make_mesh = more
    _rank(*args)


@pytest.mark.slow
def test_axes_of_size_one_change_no_bit(tmp_path, sft_file, monkeypatch):
    """Two ranks train, evaluate, save and go on from a checkpoint of a mesh without these axes."""
    common = [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48",
        f"data.train={sft_file}", "data.max_length=160", "train.batch_size=6", "train.micro_batch_size=2",
        f"train.max_steps={STEPS}", f"checkpoint.every={SAVED}", "backend.device=cpu", "evaluation.every=2",
        "evaluation.samples=0", "data.validation_share=0.1", "export.enabled=false", "report.enabled=false",
    ]  # fmt: skip

    def cell(kind: str, name: str) -> list[str]:
        backend = name.partition(" ")[0]
        return [*common, f"backend={backend}", f"model.dtype={RUNS[name]}", f"run.dir={tmp_path / kind / name}"]

    harness.run_many([cell("plain", name) for name in RUNS], tmp_path / "logs", 2)
    going_on = [name for name in RUNS if name != "zero2"]
    for name in going_on:
        shutil.copytree(tmp_path / "plain" / name, tmp_path / "resumed" / name)
        shutil.rmtree(tmp_path / "resumed" / name / "checkpoints" / f"step-{STEPS:08d}")
    monkeypatch.setattr(processes, "_rank", rank_with_more_axes)
    cells = [("resumed", name) for name in going_on] + [("more", name) for name in RUNS]
    said = harness.run_many([cell(*c) for c in cells], tmp_path / "logs", 2).output()
    assert said.count("and cp, tp") == 2 * len(cells)
    for kind, name in cells:
        ours, theirs = tmp_path / kind / name, tmp_path / "plain" / name
        assert figures(ours) == figures(theirs), (kind, name)
        assert harness.rows(ours, "evaluations.jsonl") == harness.rows(theirs, "evaluations.jsonl"), (kind, name)
        assert bit_equal(ours, theirs, STEPS), (kind, name)
