"""Checkpoints whose hashes are right and whose content is not: of another step, another run, or with tensors that are not there.

Nothing of them is loaded: they are passed over or refused, by name.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import BEFORE, LAST, flatten, list_in_manifest, require_same_run, reseal, shard
from tritune.trainer.checkpoint.manifest import MANIFEST, verify
from tritune.trainer.checkpoint.store import STATE, CheckpointStore
from tritune.trainer.errors import EXIT_INPUT, CheckpointError
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of, shard_of_run
from tritune.trainer.run.state import TrainState

STEP = "step-00000001"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Two matrices of one size, a vector and a number, as one process saves them."""
    tensors = {n: shard_of(torch.arange(6.0).view(2, 3) + i) for i, n in enumerate(("a", "b"))}
    tensors |= {"c": shard_of(torch.ones(5, dtype=torch.bfloat16)), "d": shard_of(torch.tensor(7))}
    store = CheckpointStore(tmp_path, 1, World(0, 1, torch.device("cpu")), print)
    store.save(1, tensors, {"step": 1}, None)
    verify(tmp_path / STEP, [STATE])
    return tmp_path / STEP


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a shard; the values stay where they are."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    said = change(header)
    text = (said if isinstance(said, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def move(header: dict, name: str, offset: Any) -> None:
    """Say that a tensor's values in this shard begin at another of its elements."""
    about = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    about[name]["saved_offsets"] = offset
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(about)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another's values": lambda h: h["a"].update(data_offsets=h["b"]["data_offsets"]),
    "before the file": lambda h: h["a"].update(data_offsets=[-24, 0]),
    "beyond the file": lambda h: h["a"].update(data_offsets=[1 << 40, (1 << 40) + 24]),
    "offsets of text": lambda h: h["a"].update(data_offsets=["0", "24"]),
    "integers": lambda h: h["a"].update(dtype="I32"),
    "one missing": lambda h: h.pop("a"),
    "one more": lambda h: h.update(e={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "no metadata": lambda h: h.pop("__metadata__"),
    "no sharding": lambda h: h["__metadata__"].update(DCP_SHARDING_INFO="{}"),
    "broken sharding": lambda h: h["__metadata__"].update(DCP_SHARDING_INFO="[" * 100_000),
    "a key twice": lambda h: json.dumps(h)[:-1] + ', "a": ' + json.dumps(h["a"]) + "}",
}


def lies_of_place(places: list, shapes: list, said: str) -> dict[str, Callable[[dict[str, Any]], object]]:
    return {
        **{f"begins at {at}": lambda h, at=at: move(h, "a", at) for at in places},
        **{f"shape {shape}": lambda h, shape=shape: h["a"].update(shape=shape) for shape in shapes},
        "infinite": lambda h: json.dumps(h).replace(f'"shape": [{said}', '"shape": [Infinity', 1),
    }


BOXES = lies_of_place(
    [[1, 0], [0, 1], [-1, 0], [10**30, 0], ["0", 0], [], [0], [0, 0, 0], None, [True, 0], [[0], 0], 0],
    [[3, 2], [6], [1, 3], [2, 2], [-2, -3], [2, 3, 1], [0, 3], [], 6, None], "2",
)  # fmt: skip
RUNS = lies_of_place(
    [[1], [-1], [10**30], ["0"], [], [0, 0], None, [True], [[0]]], [[2, 1], [1], [-2], [0], [2.0], 2], "2"
)


@pytest.mark.parametrize("change", [*HEADERS.values(), *BOXES.values()], ids=[*HEADERS, *BOXES])
def test_a_shard_that_lies_of_what_it_holds(checkpoint, change):
    require_refused(checkpoint, change)


@pytest.mark.parametrize("change", [*HEADERS.values(), *RUNS.values()], ids=[*HEADERS, *RUNS])
def test_a_shard_of_an_older_format_that_lies(checkpoint, change):
    flatten(checkpoint)
    verify(checkpoint, [STATE])
    require_refused(checkpoint, change)


def require_refused(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "shard-00001.safetensors"
    before = path.read_bytes()
    rewrite(path, change)
    assert path.read_bytes() != before
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        verify(checkpoint, [STATE])


def test_elements_that_two_shards_hold_or_none(tmp_path):
    """Two ranks' parts of one tensor: whole; with a gap; one over the other."""
    from tritune.trainer.checkpoint.coverage import require_covered
    from tritune.trainer.checkpoint.tensors import describe_tensors, save_tensors

    world, whole = World(0, 1, torch.device("cpu")), torch.arange(8.0)
    for number, (start, stop) in enumerate(((0, 5), (5, 8), (4, 8), (6, 8))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_tensors(folder, {"a": shard_of_run(torch.Size([8]), start, whole[start:stop])}, world)
        shard(folder).rename(tmp_path / f"{number}.safetensors")
    tensors = describe_tensors({"a": shard_of(whole)})
    require_covered(tmp_path, ["0.safetensors", "1.safetensors"], tensors)
    for second, said in ((2, "elements from 4 on are there twice"), (3, "elements from 5 on are missing")):
        with pytest.raises(CheckpointError, match=f"a: {said}"):
            require_covered(tmp_path, ["0.safetensors", f"{second}.safetensors"], tensors)
    with pytest.raises(CheckpointError, match="a has 5 of 8 elements"):
        require_covered(tmp_path, ["0.safetensors"], tensors)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"step {value}": lambda m, value=value: m.update(step=value) for value in (-1, True, 1.0, "1", None, [1])},
    **{f"format {value}": lambda m, value=value: m.update(format=value) for value in (1, 2, 3, 5, True, 4.0, "4", None)},
    **{f"size {value}": lambda m, value=value: m["files"][STATE].update(size=value) for value in (-1, True, "9", 10**400)},
    **{f"shape {value}": lambda m, value=value: m["tensors"]["a"].update(shape=value) for value in
       ([2, -3], [-2, -3], [2.0, 3], ["2"], [10**18, 10**18], None, 6, [[6]])},
    "another dtype": lambda m: m["tensors"]["a"].update(dtype="torch.float64"),
    "an unknown dtype": lambda m: m["tensors"]["a"].update(dtype="torch.quint8"),
    "a tensor more": lambda m: m["tensors"].update(e={"shape": [1], "dtype": "torch.float32"}),
    "a tensor less": lambda m: m["tensors"].pop("a"),
}  # fmt: skip


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_lies(checkpoint, change):
    reseal(checkpoint, change)
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        verify(checkpoint, [STATE])


@pytest.mark.parametrize("name", [MANIFEST, STATE, "shard"])
@pytest.mark.parametrize("what", ["fifo", "endless", "folder"])
def test_what_is_no_file_is_not_opened(checkpoint, name, what):
    path = shard(checkpoint) if name == "shard" else checkpoint / name
    path.unlink()
    {"fifo": os.mkfifo, "endless": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[what](path)
    with pytest.raises(CheckpointError, match=path.name):
        verify(checkpoint, [STATE])


STATES = {
    "step": [-1, True, 3.0, "3", None, 10**30], "epoch": [-1, 5, 10**9], "window": [-1, 10**9], "tokens": [-1, 1 << 70],
    "sources": [[["a"]], [[-1, 0]], [[0]], [[0, True]], 5], "used": [-1], "nonfinite": [-5, 10**9], "evaluated": [-1, 10**9],
    "best": [float("nan"), float("inf"), "x", True], "best_step": [-1, 99, 1.0], "stale": [10**9],
    "train_seconds": [float("nan"), -1.0, float("inf")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in STATES.items() for v in values])
def test_a_state_that_no_run_comes_to(name, value):
    state, kept = TrainState(), TrainState(step=3, epoch=1, tokens=9, best=0.5, best_step=2, evaluated=2)
    state.load_json(kept.to_json())
    assert state == kept
    with pytest.raises(CheckpointError, match=name):
        state.load_json(kept.to_json() | {name: value})
    assert state == kept, "nothing was taken over"


@pytest.mark.parametrize(
    "text", ["null", "[]", '"x"', "{", "[" * 100_000, "NaN", '{"a": NaN}', '{"a": 1, "a": 1}', "\xff"]
)
def test_a_state_that_is_no_object(checkpoint, text):
    (checkpoint / STATE).write_bytes(text.encode("latin1"))
    reseal(checkpoint)
    store = CheckpointStore(checkpoint.parent, 1, World(0, 1, torch.device("cpu")), print)
    with pytest.raises(CheckpointError, match=r"state\.json: it "):
        store.at(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_no_training_leaves(tmp_path, value):
    world, name = World(0, 1, torch.device("cpu")), "optim.w.exp_avg_sq"
    store, moments = CheckpointStore(tmp_path, 1, world, print), torch.tensor([1.0, value, 0.0])
    store.save(1, {name: shard_of(moments)}, {"step": 1}, None)
    with pytest.raises(CheckpointError, match=f"{STEP}: {name} "):
        store.load(store.newest(), {name: shard_of(torch.zeros(3))})


def test_one_that_is_named_after_another_step_is_passed_over(again, unbroken):
    directory, start = again
    (directory / "checkpoints" / LAST).rename(directory / "checkpoints" / "step-00000008")
    result = start()
    assert result.code == 0, result.err
    assert "step-00000008 is broken and not used" in result.err
    assert "it is named so, and holds step 6" in result.err
    assert f"resume    from {BEFORE}, step 4 of 6" in result.err
    require_same_run(directory, unbroken[1])


def test_one_whose_state_is_of_another_step_is_refused(again):
    directory, start = again
    path = directory / "checkpoints" / LAST / STATE
    shutil.copy(directory / "checkpoints" / BEFORE / STATE, path)
    list_in_manifest(path.parent, STATE, path)
    result = start()
    assert result.code == 1
    assert f"{LAST}: its state is of step 4. Move {LAST} aside, and the same command goes on" in result.err
    assert "Traceback" not in result.err
    path.parent.rename(path.parent.with_name("aside"))
    result = start()
    assert f"resume    from {BEFORE}, step 4 of 6" in result.err


def test_one_of_another_run_is_refused_by_what_differs(again, tmp_path):
    """The directory's own record agrees with the command; the checkpoint was brought here from a run of another seed."""
    directory, start = again
    assert start("seed=5", "optim.lr=0.5", f"run.dir={tmp_path / 'other'}", "train.max_steps=2").code == 0
    foreign = directory / "checkpoints" / "step-00000002"
    shutil.rmtree(directory / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints" / foreign.name, foreign)
    result = start()
    assert result.code == EXIT_INPUT, result.err
    for said in (
        "step-00000002 is of a run with other values",
        "seed: 5 -> 0",
        "optim.lr: 0.5 -> ",
        "train.max_steps: 2 -> 6",
    ):
        assert said in result.err
    assert verify(foreign)["step"] == 2, "it stays where it is"
