"""Checkpoints of formats 2 and 3 load: those that the code of then wrote (`make_flat.py`), and whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint import make_flat
from cuts import ALONE, LAYOUTS, held_by, shard_at
from saved import LAST, flatten, flip, require_same_run
from tritune.trainer.checkpoint.manifest import verify
from tritune.trainer.checkpoint.store import CheckpointStore
from tritune.trainer.errors import CheckpointError
from tritune.trainer.verify.compare import saved_tensors

HERE, STEP = Path(__file__).parent, f"step-{make_flat.STEP:08d}"
FORMATS = pytest.mark.parametrize("number", [2, 3])


@FORMATS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_was_written_then_is_read(number, layout):
    store, whole = CheckpointStore(HERE / f"format{number}", 1, ALONE, print), make_flat.whole()
    found = store.newest()
    assert found[1]["format"] == number
    for held in held_by(whole, layout):
        read = {n: shard_at(torch.zeros_like(whole[n]), boxes) for n, boxes in held.items()}
        assert store.load(found, read) == make_flat.STATE
        for name, shard in read.items():
            assert all(part.values.equal(whole[name][part.box.slices]) for part in shard.parts), name


@FORMATS
def test_a_part_of_its_tensors(number):
    (group,) = saved_tensors(HERE / f"format{number}" / STEP, "model.")
    assert {name: tensor.tolist() for name, tensor in group.items()} == {
        name: tensor.view(-1).tolist() for name, tensor in make_flat.whole().items() if name.startswith("model.")
    }


@FORMATS
def test_one_changed_bit_is_found(number, tmp_path):
    shutil.copytree(HERE / f"format{number}" / STEP, tmp_path / STEP)
    path = tmp_path / STEP / "shard-00002.safetensors"
    flip(path, 8 * (path.stat().st_size - 10))
    with pytest.raises(CheckpointError, match=r"shard-00002.*: the content changed"):
        verify(tmp_path / STEP)


@FORMATS
def test_a_run_goes_on_from_one(again, unbroken, number):
    """Halfway back to a checkpoint as it was then, on to the same digits."""
    directory, start = again
    shutil.rmtree(directory / "checkpoints" / LAST)
    checkpoints = sorted((directory / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        flatten(checkpoint, number)
    result = start()
    assert result.code == 0, result.err
    assert f"resume    from {checkpoints[-1].name}, step 4 of 6" in result.err
    require_same_run(directory, unbroken[1])
    assert verify(directory / "checkpoints" / LAST)["format"] == 4
