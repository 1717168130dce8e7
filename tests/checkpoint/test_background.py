"""Saving in the background: what is saved is the state at the call, failures are not lost, kills leave whole checkpoints."""

from __future__ import annotations

import random
import signal
import time

import harness
import pytest
import torch
from tritune.trainer.checkpoint import store as store_module
from tritune.trainer.checkpoint.store import CheckpointStore
from tritune.trainer.errors import CheckpointError
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of
from tritune.trainer.verify.compare import bit_equal

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes a quarter of a second."""
    write = store_module.save_tensors

    def slowly(*args):
        time.sleep(0.25)
        return write(*args)

    monkeypatch.setattr(store_module, "save_tensors", slowly)


def load(store, tensors):
    return store.load(store.newest(), tensors)


def test_it_is_the_state_at_the_call(tmp_path, slow_disk):
    values = torch.arange(6.0).reshape(2, 3)
    store = CheckpointStore(tmp_path, 3, ALONE, print, asynchronous=True)
    began = time.perf_counter()
    store.save(1, {"model.w": shard_of(values)}, {"step": 1}, None)
    assert time.perf_counter() - began < 0.2  # it did not wait for the disk
    values.fill_(-1.0)  # training goes on
    assert list(tmp_path.glob("step-*")) == []
    store.wait()
    read = torch.zeros(2, 3)
    assert load(store, {"model.w": shard_of(read)}) == {"step": 1}
    assert read.equal(torch.arange(6.0).reshape(2, 3))


def test_one_save_waits_for_the_one_before(tmp_path, slow_disk):
    values = torch.zeros(4)
    store = CheckpointStore(tmp_path, 3, ALONE, print, asynchronous=True)
    for step in (1, 2, 3):
        values.fill_(step)
        store.save(step, {"model.w": shard_of(values)}, {"step": step}, None)
    store.wait()
    for step in (1, 2, 3):
        read = torch.zeros(4)
        assert store.load(store.at(step), {"model.w": shard_of(read)}) == {"step": step}
        assert read.equal(torch.full((4,), float(step)))


@pytest.mark.parametrize("noticed", ["wait", "save", "load"])
def test_a_failure_is_raised_where_training_next_looks(tmp_path, monkeypatch, noticed):
    def fails(*_):
        raise OSError(28, "No space left on device")

    tensors = {"model.w": shard_of(torch.zeros(2))}
    store = CheckpointStore(tmp_path, 3, ALONE, print, asynchronous=True)
    store.save(1, tensors, {"step": 1}, None)
    store.wait()
    monkeypatch.setattr(store_module, "save_tensors", fails)
    store.save(2, tensors, {"step": 2}, None)
    calls = {"wait": store.wait, "save": lambda: store.save(3, tensors, {"step": 3}, None), "load": lambda: store.at(1)}
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved.*No space left"):
        calls[noticed]()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]  # nothing half, nothing lost


@pytest.fixture
def overrides(tiny):
    return [*tiny, "train.max_steps=12", "checkpoint.every=2", "checkpoint.keep_last=20", "evaluation.base=false"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_the_same_checkpoints(overrides, tmp_path, backend):
    for asynchronous in ("false", "true"):
        where = [f"checkpoint.asynchronous={asynchronous}", f"backend={backend}", f"run.dir={tmp_path / asynchronous}"]
        harness.run([*overrides, *where], tmp_path / "logs", 2)
    assert len(list((tmp_path / "true" / "checkpoints").glob("step-*"))) == 6
    assert all(bit_equal(tmp_path / "true", tmp_path / "false", step) for step in range(2, 13, 2))


@pytest.mark.slow
def test_kills_while_it_writes(overrides, tmp_path):
    overrides = [*overrides, "train.max_steps=60", "checkpoint.every=1", "checkpoint.asynchronous=true", "backend=fsdp"]
    harness.run([*overrides, f"run.dir={tmp_path / 'unbroken'}"], tmp_path / "logs", 2)
    rng, broken, killed = random.Random(8), tmp_path / "broken", 0
    for _ in range(6):
        job = harness.start([*overrides, f"run.dir={broken}"], tmp_path / "logs", 2)
        done = harness.rows(broken)
        harness.wait_for_step(job, broken, (done[-1]["step"] if done else 0) + rng.randint(1, 5))
        time.sleep(rng.random() * 0.05)
        job.signal(signal.SIGKILL)
        killed += -signal.SIGKILL in job.wait()
    assert killed >= 3
    harness.run([*overrides, f"run.dir={broken}"], tmp_path / "logs", 2)
    curves = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in harness.rows(d)] for d in (tmp_path / "unbroken", broken)
    ]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_signal_waits_for_the_disk(overrides, tmp_path):
    overrides = [*overrides, "train.max_steps=400", "checkpoint.asynchronous=true", "checkpoint.every=50"]
    job = harness.start([*overrides, f"run.dir={tmp_path}"], tmp_path / "logs", 2)
    harness.wait_for_step(job, tmp_path, 5)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75, 75]
    step = harness.rows(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
