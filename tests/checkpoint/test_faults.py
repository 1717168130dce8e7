"""Broken checkpoints: found, named, passed over, and the run ends with the same digits as one that was never broken.

A finished run is damaged and started again: it goes back to the newest whole checkpoint and repeats the steps after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved import BEFORE, LAST, STEPS, figures, flip, list_in_manifest, require_same_run, shard
from tritune.trainer.checkpoint.manifest import MANIFEST, verify
from tritune.trainer.checkpoint.store import PARTIAL, STATE, CheckpointStore
from tritune.trainer.checkpoint.tensors import save_tensors
from tritune.trainer.errors import EXIT_FAILED, EXIT_INPUT, CheckpointError
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of


@pytest.fixture
def newest(unbroken, tmp_path) -> Path:
    """A copy of the newest checkpoint alone."""
    shutil.copytree(unbroken[1] / "checkpoints" / LAST, tmp_path / "checkpoints" / LAST)
    return tmp_path / "checkpoints" / LAST


# -- one file of the newest checkpoint is broken


def _truncate(name: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def damage(checkpoint: Path) -> Path:
        path = name(checkpoint)
        os.truncate(path, path.stat().st_size - 1)
        return path

    return damage


def _empty(checkpoint: Path) -> Path:
    os.truncate(shard(checkpoint), 0)
    return shard(checkpoint)


def _flip_tensor(checkpoint: Path) -> Path:
    path = shard(checkpoint)
    flip(path, 8 * (path.stat().st_size - 100) + 3)
    return path


def _flip_state(checkpoint: Path) -> Path:
    text = (checkpoint / STATE).read_text()
    flip(checkpoint / STATE, 8 * text.index("6"))  # "step": 6 becomes 7, which is valid JSON
    return checkpoint / STATE


def _remove(name: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def damage(checkpoint: Path) -> Path:
        path = name(checkpoint)
        path.unlink()
        return path

    return damage


def _extra(checkpoint: Path) -> Path:
    shutil.copy(shard(checkpoint), checkpoint / "shard-00009.safetensors")
    return checkpoint / "shard-00009.safetensors"


def _link(name: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def damage(checkpoint: Path) -> Path:
        path = name(checkpoint)
        outside = checkpoint.parent.parent / f"outside-{path.name}"
        path.rename(outside)
        path.symlink_to(outside)
        return path

    return damage


def _state(checkpoint: Path) -> Path:
    return checkpoint / STATE


def _manifest(checkpoint: Path) -> Path:
    return checkpoint / MANIFEST


DAMAGES: dict[str, Callable[[Path], Path]] = {
    "truncated-shard": _truncate(shard),
    "truncated-state": _truncate(_state),
    "truncated-manifest": _truncate(_manifest),
    "empty-shard": _empty,
    "flipped-tensor": _flip_tensor,
    "flipped-state": _flip_state,
    "missing-shard": _remove(shard),
    "missing-state": _remove(_state),
    "missing-manifest": _remove(_manifest),
    "extra-shard": _extra,
    "linked-shard": _link(shard),
    "linked-state": _link(_state),
    "linked-manifest": _link(_manifest),
}


SOON = ("truncated-shard", "flipped-state", "missing-shard", "extra-shard", "linked-shard")  # the others are run later


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_file_is_found_and_named(newest, damage):
    path = damage(newest)
    with pytest.raises(CheckpointError, match=path.name):
        verify(newest)


@pytest.mark.parametrize(
    "damage", [pytest.param(d, id=n, marks=() if n in SOON else pytest.mark.slow) for n, d in DAMAGES.items()]
)
def test_a_broken_file_is_named_and_the_checkpoint_before_used(again, unbroken, damage):
    directory, start = again
    path = damage(directory / "checkpoints" / LAST)
    result = start()
    assert result.code == 0, result.err
    said = [line for line in result.lines() if "is broken and not used" in line]
    assert len(said) == 1, result.err
    assert LAST in said[0]
    assert path.name in said[0], "the message names the file"
    assert f"resume    from {BEFORE}, step 4 of 6" in result.err
    assert said[0] in (directory / "train.log").read_text()
    assert (directory / "checkpoints" / f"{LAST}.broken").is_dir(), "kept, for whoever looks into it"
    require_same_run(directory, unbroken[1])


def test_two_broken_checkpoints_are_both_passed_over(again, unbroken):
    directory, start = again
    _flip_tensor(directory / "checkpoints" / LAST)
    _remove(shard)(directory / "checkpoints" / BEFORE)
    result = start()
    assert result.code == 0, result.err
    assert result.err.count("is broken and not used") == 2
    assert "resume    from step-00000002, step 2 of 6" in result.err
    require_same_run(directory, unbroken[1])


@pytest.mark.slow
def test_breaking_the_same_step_twice_keeps_both(again, unbroken):
    directory, start = again
    for _ in range(2):
        _flip_tensor(directory / "checkpoints" / LAST)
        assert start().code == 0
    assert (directory / "checkpoints" / f"{LAST}.broken").is_dir()
    assert (directory / "checkpoints" / f"{LAST}.broken1").is_dir()
    require_same_run(directory, unbroken[1])


def test_all_broken_fails_once_and_says_what_to_do(again, unbroken):
    directory, start = again
    for step in STEPS:
        _flip_tensor(directory / "checkpoints" / f"step-{step:08d}")
    result = start()
    assert result.code == EXIT_FAILED
    assert result.err.count("is broken and not used") == 3
    message = result.lines()[-1]
    for word in ("CheckpointError", str(directory / "checkpoints"), "none of 3 checkpoint(s) is whole", "run.dir"):
        assert word in message
    assert "Traceback" not in result.err
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAILED)
    assert "none of 3" in status["culprit"]
    assert sorted(p.name for p in (directory / "checkpoints").glob("step-*")) == [f"step-{s:08d}.broken" for s in STEPS]
    assert figures(directory) == figures(unbroken[1]), "the log is not cut before there is something to go on from"
    result = start()  # as the message says: in this directory, now that they are aside
    assert result.code == 0, result.err
    assert "resume    from" not in result.err
    require_same_run(directory, unbroken[1])


def test_resume_required_and_all_broken(again):
    directory, start = again
    for step in STEPS:
        _flip_tensor(directory / "checkpoints" / f"step-{step:08d}")
    assert start("run.resume=require").code == EXIT_FAILED
    result = start("run.resume=require")  # now that they are aside there is nothing to go on from
    assert result.code == EXIT_INPUT
    assert "holds no checkpoint" in result.err


@pytest.mark.parametrize("seed", range(4))
def test_random_flips_are_all_found(newest, seed):
    """50 of 200 single bits over all files of a checkpoint, each file as often as the others."""
    checkpoint = newest
    verify(checkpoint)
    rng, missed = random.Random(seed), []
    for index in range(50):
        files = sorted(checkpoint.iterdir())
        path = files[index % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        before = path.read_bytes()
        flip(path, bit)
        assert path.read_bytes() != before
        try:
            verify(checkpoint)
        except CheckpointError:
            pass
        else:
            around = before[max(bit // 8 - 30, 0) : bit // 8 + 10]
            missed.append(f"{path.name} bit {bit}: {around!r}")
        flip(path, bit)
        assert path.read_bytes() == before
    assert not missed
    verify(checkpoint)


@pytest.mark.slow
def test_every_flip_of_the_manifest_is_found_or_harmless(newest):
    """Whatever bit of the manifest changes, it must no longer verify, or say the same."""
    checkpoint = newest
    path, whole = checkpoint / MANIFEST, verify(checkpoint)
    missed = []
    for bit in range(0, 8 * path.stat().st_size, 7):  # 7 and 8 have no common divisor: every position of a byte comes
        flip(path, bit)
        try:
            if verify(checkpoint) != whole:
                missed.append(bit)
        except CheckpointError:
            pass
        flip(path, bit)
    assert not missed, f"{len(missed)} flips change the manifest and are not found"


# -- a manifest that was written to harm


@pytest.mark.parametrize(
    "name", ["../../secret.txt", "/etc/hostname", "..", ".", "sub/../state.json", "", "a\0b", "x" * 5000]
)
def test_hostile_names_are_not_followed(newest, name):
    """The file that is named exists, and its size and hash are right."""
    secret = newest.parent.parent / "secret.txt"
    secret.write_text("not a part of the checkpoint")
    list_in_manifest(newest, name, secret)
    with pytest.raises(CheckpointError):
        verify(newest)


def test_a_hostile_name_is_passed_over_by_a_run(again, unbroken):
    directory, start = again
    secret = directory / "secret.txt"
    secret.write_text("not a part of the checkpoint")
    list_in_manifest(directory / "checkpoints" / LAST, "../../secret.txt", secret)
    result = start()
    assert result.code == 0, result.err
    assert f"{LAST} is broken and not used" in result.err
    assert (directory / "secret.txt").read_text() == "not a part of the checkpoint"
    require_same_run(directory, unbroken[1])


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{}", '{"format": 1}', "[" * 100_000, "\xff",
     '{"format": 1, "step": 6, "files": {}, "tensors": {}}',
     '{"format": 1, "step": 6, "files": [1], "tensors": {}}', '{"format": 2, "step": 6, "files": {}, "tensors": {}}',
     '{"format": 1, "step": 6, "files": {"state.json": {"size": ' + "7" * 5000 + ', "sha256": "x"}}, "tensors": {}}',
     '{"format": 1, "step": 6, "files": {"state.json": {"size": Infinity, "sha256": "x"}}, "tensors": {}}'],
    ids=["empty", "null", "list", "number", "object", "format-only", "deep", "not-utf8", "nothing", "files-list",
         "format-2", "digits", "infinite"],
)  # fmt: skip
def test_hostile_manifests_are_refused(newest, text):
    (newest / MANIFEST).write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"manifest"):
        verify(newest)


SHARDS = {
    "short": b"abc",
    "huge-header": struct.pack("<Q", 2**62) + b"{}",
    "no-json": struct.pack("<Q", 4) + b"abcd",
    "list": struct.pack("<Q", 2) + b"[]",
    "unknown-dtype": b"",
    "no-offsets": b"",
}


@pytest.mark.parametrize("kind", SHARDS)
def test_hostile_shards_that_the_manifest_vouches_for(newest, kind):
    """Hashes agree, because the same hand wrote them: the content is still refused, with the file's name."""
    path, content = shard(newest), SHARDS[kind]
    if not content:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        entry = next(v for k, v in header.items() if k != "__metadata__")
        if kind == "unknown-dtype":
            entry["dtype"] = "F7"
        else:
            del entry["data_offsets"]
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(content)
    list_in_manifest(newest, path.name, path)
    with pytest.raises(CheckpointError):
        verify(newest)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unlisted", "no-json", "list", "unknown-key", "wrong-type"])
def test_hostile_state_that_the_manifest_vouches_for(again, unbroken, how):
    directory, start = again
    checkpoint = directory / "checkpoints" / LAST
    path = checkpoint / STATE
    if how == "unlisted":
        path.unlink()
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        del manifest["files"][STATE]
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    else:
        state = json.loads(path.read_text())
        texts = {"no-json": "{", "list": "[]", "unknown-key": json.dumps(state | {"advance": 1}),
                 "wrong-type": json.dumps(state | {"step": "six"})}  # fmt: skip
        path.write_text(texts[how])
        list_in_manifest(checkpoint, STATE, path)
    result = start()
    assert result.code == 0, result.err
    assert LAST in result.err
    require_same_run(directory, unbroken[1])


def test_a_checkpoint_that_is_a_link_to_another_place(again, unbroken, tmp_path):
    directory, start = again
    elsewhere = tmp_path / "elsewhere"
    (directory / "checkpoints" / LAST).rename(elsewhere)
    (directory / "checkpoints" / LAST).symlink_to(elsewhere)
    _flip_tensor(elsewhere)
    kept = {p.name: p.read_bytes() for p in elsewhere.iterdir()}
    assert start().code == 0
    assert {p.name: p.read_bytes() for p in elsewhere.iterdir()} == kept
    require_same_run(directory, unbroken[1])


# -- saving


def test_a_non_tensor_is_refused(tmp_path):
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(TypeError, match=r"optim\.step is a int; only shards"):
        save_tensors(tmp_path, {"model.w": shard_of(torch.zeros(2)), "optim.step": 3}, world)
    assert list(tmp_path.iterdir()) == []
    store = CheckpointStore(tmp_path / "checkpoints", 2, world, print)
    with pytest.raises(CheckpointError, match=r"step 1 .*optim\.step is a int"):
        store.save(1, {"model.w": shard_of(torch.zeros(2)), "optim.step": 3}, {"step": 1}, None)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_leftovers_are_swept_at_the_next_start(again, unbroken):
    """A save that was killed leaves `.partial-step-*`, pruning that was killed `.partial-step-*-old`."""
    directory, start = again
    checkpoints = directory / "checkpoints"
    shutil.copytree(checkpoints / BEFORE, checkpoints / f"{PARTIAL}{LAST}")
    (checkpoints / f"{PARTIAL}{LAST}" / MANIFEST).unlink()
    (checkpoints / LAST).rename(checkpoints / f"{PARTIAL}step-00000008-old")
    result = start()
    assert result.code == 0, result.err
    assert f"resume    from {BEFORE}" in result.err
    assert list(checkpoints.glob(f"{PARTIAL}*")) == []
    require_same_run(directory, unbroken[1])


@pytest.fixture
def small_disk(unbroken, tmp_path):
    """A file system of its own on which one checkpoint has room and two have not."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root and mount")
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in (unbroken[1] / "checkpoints" / LAST).iterdir())
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.4 * size) + 100_000}", "tmpfs", place],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs could be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk_while_saving(tritune, unbroken, small_disk):
    overrides, reference = unbroken
    directory = small_disk / "run"
    result = tritune(*overrides, f"run.dir={directory}")
    assert result.code == EXIT_FAILED, result.err
    message = result.lines()[-1]
    for word in ("tritune: CheckpointError", "step 4 could not be saved", str(directory / "checkpoints")):
        assert word in message
    assert "no space left on device" in message.lower()
    assert "make room" in message
    assert "Traceback" not in result.err
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAILED)
    assert "step 4" in status["culprit"]
    assert status["step"] == 4
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step-00000002"], "the partial one is removed"
    assert verify(directory / "checkpoints" / "step-00000002")["step"] == 2
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    result = tritune(*overrides, f"run.dir={directory}")
    assert result.code == 0, result.err
    assert "resume    from step-00000002" in result.err
    require_same_run(directory, reference)


def test_full_disk_at_the_first_save(tritune, unbroken, small_disk):
    overrides, reference = unbroken
    directory, ballast = small_disk / "run", small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 300_000))
    result = tritune(*overrides, f"run.dir={directory}")
    assert result.code == EXIT_FAILED, result.err
    assert "step 2 could not be saved" in result.lines()[-1]
    assert list((directory / "checkpoints").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert tritune(*overrides, f"run.dir={directory}").code == 0
    require_same_run(directory, reference)
