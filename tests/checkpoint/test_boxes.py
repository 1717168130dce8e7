"""Tensors that are cut along any dimension, or into runs, are saved and read again by any other cut: every element, exactly."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cuts import ALONE, LAYOUTS, held_by, shard_at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Along
from tritune.trainer.checkpoint.manifest import verify
from tritune.trainer.checkpoint.store import CheckpointStore
from tritune.trainer.checkpoint.tensors import describe_tensors, load_tensors, save_tensors
from tritune.trainer.errors import CheckpointError
from tritune.trainer.parallel.box import Box, boxes_of_run, first_fault, runs_of_box
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import Shard, shard_of, shard_of_run

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def cut(draw, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that hold each element of a tensor once: it is halved along some dimension, and the halves again."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        places = [(d, n) for d, size in enumerate(box.sizes) for n in range(1, size)]
        if not places:
            return [*boxes, box]
        d, n = draw(st.sampled_from(places))
        first = [size if i != d else n for i, size in enumerate(box.sizes)]
        second = [size if i != d else size - n for i, size in enumerate(box.sizes)]
        begin = [offset if i != d else offset + n for i, offset in enumerate(box.offsets)]
        boxes += [Box(box.offsets, tuple(first)), Box(tuple(begin), tuple(second))]
    return boxes


@given(st.data(), SHAPES)
def test_a_run_is_boxes_that_follow_one_another(data, shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    boxes = boxes_of_run(shape, start, stop)
    held = [numbers[box.slices].reshape(-1).tolist() for box in boxes]
    assert list(itertools.chain(*held)) == list(range(start, stop))
    assert all(held)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(st.data(), SHAPES)
def test_a_box_is_runs_that_hold_its_elements_and_no_others(data, shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for box in data.draw(cut(shape)):
        runs = runs_of_box(shape, box)
        assert [n for start, stop in runs for n in range(start, stop)] == numbers[box.slices].reshape(-1).tolist()


@given(st.data(), SHAPES)
def test_the_first_element_that_is_not_held_once(data, shape):
    boxes = data.draw(cut(shape))
    assert first_fault(boxes, shape) is None
    wrong = data.draw(st.lists(st.sampled_from(boxes), max_size=3)) + boxes[data.draw(st.integers(0, 1)) :]
    times = np.zeros(shape, int)
    for box in wrong:
        times[box.slices] += 1
    faults = np.argwhere(times != 1)
    expected = (tuple(faults[0].tolist()), int(times[tuple(faults[0])])) if len(faults) else None
    assert first_fault(wrong, shape) == expected


@settings(max_examples=40)
@given(st.data(), SHAPES)
def test_any_cut_is_read_by_any_other(data, shape):
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1
    with tempfile.TemporaryDirectory() as name:
        save_tensors(Path(name), {"w": shard_at(whole, data.draw(cut(shape)))}, ALONE)
        boxes = data.draw(cut(shape))
        begin = data.draw(st.integers(0, whole.numel()))
        run = torch.zeros(whole.numel() - begin)
        for shard in (shard_at(torch.zeros(shape), boxes), shard_of_run(whole.shape, begin, run)):
            load_tensors(Path(name), {"w": shard}, describe_tensors({"w": shard}), ALONE)
            assert all(part.values.equal(whole[part.box.slices]) for part in shard.parts)
        assert run.equal(whole.view(-1)[begin:])


# -- over two ranks

WHOLE = {
    "columns": torch.arange(42.0).view(6, 7),  # of a row-parallel layer
    "experts": torch.arange(60.0, dtype=torch.float64).view(4, 3, 5),  # each rank holds every other one
    "rows": torch.arange(10.0).view(5, 2).to(torch.bfloat16),
    "run": torch.arange(35.0).view(7, 5),  # ZeRO's, which ends within a row
    "number": torch.tensor(7),  # on both
}


def of_rank(rank: int) -> dict[str, Shard]:
    w = WHOLE
    run = w["run"].view(-1)[17:] if rank else w["run"].view(-1)[:17]
    return {
        "columns": shard_at(w["columns"], [Box((0, 4 * rank), (6, 3 if rank else 4))]),
        "experts": shard_at(w["experts"], [Box((e, 0, 0), (1, 3, 5)) for e in (rank, rank + 2)]),
        "rows": shard_at(w["rows"], [Box((3 * rank, 0), (2 if rank else 3, 2))]),
        "run": shard_of_run(w["run"].shape, 17 * rank, run.clone()),
        "number": shard_of(w["number"]),
    }


def save_of_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meet", 2), rank=rank, world_size=2)
    try:
        world = World(rank, 2, torch.device("cpu"))
        CheckpointStore(Path(folder), 1, world, print).save(1, of_rank(rank), {"step": 1}, None)
        laid_out(rank)
    finally:
        dist.destroy_process_group()


def laid_out(rank: int) -> None:
    """A DTensor's box, along any dimension, over one or two axes."""
    tensor = WHOLE["columns"]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("shard", "tp"))
    for layout, box in (
        ([Along(1), Replicate()], Box((0, 4 * rank), (6, 4 - rank))),
        ([Along(0), Along(1)], Box((3 * rank, 0), (3, 7))),
        ([Replicate(), Along(1)], Box((0, 0), (6, 7))),
    ):
        (part,) = shard_of(distribute_tensor(tensor, mesh, layout)).parts
        assert part.box == box, layout
        assert part.values.equal(tensor[box.slices])
    with pytest.raises(ValueError, match="no single box"):
        shard_of(distribute_tensor(tensor, mesh, [Partial(), Replicate()]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    torch.multiprocessing.start_processes(save_of_rank, (str(folder),), nprocs=2, start_method="fork")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_columns_and_experts_of_two_ranks_are_read_by_others(saved, layout):
    store = CheckpointStore(saved, 1, ALONE, print)
    for held in held_by(WHOLE, layout):
        read = {n: shard_at(torch.zeros_like(WHOLE[n]), boxes) for n, boxes in held.items()}
        assert store.load(store.newest(), read) == {"step": 1}
        for name, shard in read.items():
            assert all(part.values.equal(WHOLE[name][part.box.slices]) for part in shard.parts), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_it_too(saved):
    read = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(saved / "step-00000001")), no_dist=True)
    assert [name for name in WHOLE if not read[name].equal(WHOLE[name])] == []


def test_what_a_rank_holds_twice_is_found(saved, tmp_path):
    """Column 4 of the first rank's box lies under the second's, and hashes agree."""
    boxes = [Box((0, 0), (6, 5)), Box((0, 4), (6, 3))]
    whole = {"w": WHOLE["columns"]}
    for number, box in enumerate(boxes):
        (tmp_path / str(number)).mkdir()
        (name,) = save_tensors(tmp_path / str(number), {"w": shard_at(whole["w"], [box])}, ALONE)
        (tmp_path / str(number) / name).rename(tmp_path / f"{number}.safetensors")
    from tritune.trainer.checkpoint.coverage import require_covered

    described = describe_tensors({"w": shard_of(whole["w"])})
    with pytest.raises(CheckpointError, match=r"w: elements from \[0, 4\] on are there twice"):
        require_covered(tmp_path, ["0.safetensors", "1.safetensors"], described)
    with pytest.raises(CheckpointError, match=r"w: elements from \[0, 5\] on are missing; w has 30 of 42 elements"):
        require_covered(tmp_path, ["0.safetensors"], described)
    assert verify(saved / "step-00000001")["format"] == 4
