"""The cache: one builds and the others wait, killed builders leave nothing that is used, whatever changes is built anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from tritune.trainer.config import Config
from tritune.trainer.data import cache
from tritune.trainer.data.cache import build_once, content_hash, read_entry
from tritune.trainer.data.examples import Columns
from tritune.trainer.data.tables import Divider, TableFiles
from tritune.trainer.errors import InputError, StopRequested

FORK = multiprocessing.get_context("fork")


def build_slowly(folder: Path, seconds: float, log: Path):
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    columns = Columns()
    columns.add([1, 2, 3], [(1, 3)], "f:1")
    with TableFiles(folder, ["train"]) as files:
        divider = Divider({}, Config().data, None, files.write, files.reject)
        files.write("train", divider.sinks["train"].take(columns.batch(), []))
        time.sleep(seconds)
        return {"tables": files.finish(divider.sinks)}


def open_entry(root: Path, log: Path, seconds: float) -> None:
    tables, manifest = build_once(root, "key", lambda folder: build_slowly(folder, seconds, log), lambda: None)
    ok = tables["train"]["ids"].to_pylist() == [[1, 2, 3]] and manifest["tables"]["train"]["report"]["rows"] == 1
    os._exit(0 if ok else 1)


def start(*arguments) -> multiprocessing.Process:
    process = FORK.Process(target=open_entry, args=arguments)
    process.start()
    return process


def wait_for(path: Path) -> None:
    for _ in range(500):
        if path.is_file() and path.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def test_one_process_builds_and_the_others_wait(tmp_path):
    log = tmp_path / "log"
    processes = [start(tmp_path / "cache", log, 0.5) for _ in range(5)]
    for process in processes:
        process.join(20)
    assert [p.exitcode for p in processes] == [0] * 5
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_builder_leaves_nothing_that_is_used(tmp_path):
    root, log = tmp_path / "cache", tmp_path / "log"
    victim = start(root, log, 60.0)
    wait_for(log)
    waiting = start(root, log, 0.0)
    time.sleep(0.2)
    assert read_entry(root, "key") is None
    assert waiting.is_alive(), "it waits for the lock"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(20)
    waiting.join(20)
    assert waiting.exitcode == 0, "the kernel gave the lock up with the process"
    assert len(log.read_text().splitlines()) == 2
    assert not list(root.glob("*.part-*")), "its folder is gone too"


@pytest.mark.parametrize("damage", ["table", "manifest", "missing"])
def test_a_damaged_entry_is_built_anew(tmp_path, damage):
    root, log = tmp_path / "cache", tmp_path / "log"

    def entry():
        return build_once(root, "key", lambda folder: build_slowly(folder, 0.0, log), lambda: None)[0]

    entry()
    path = root / "key" / ("manifest.json" if damage == "manifest" else "train.arrow")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    assert read_entry(root, "key") is None
    assert entry()["train"]["ids"].to_pylist() == [[1, 2, 3]]
    assert len(log.read_text().splitlines()) == 2
    entry()
    assert len(log.read_text().splitlines()) == 2


def test_a_refusal_is_told_to_those_that_wait(tmp_path, monkeypatch):
    """Eight ranks must not read a terabyte one after the other to find the same bad row."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    calls = []

    def refuse(folder):
        calls.append(folder)
        raise InputError("f:7", "it is bad", "Mend it")

    for _ in range(3):
        with pytest.raises(InputError, match="f:7: it is bad"):
            build_once(tmp_path, "key", refuse, lambda: None)
    assert len(calls) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError):
        build_once(tmp_path, "key", refuse, lambda: None)
    assert len(calls) == 2, "another start looks again: the file may have been mended"


def test_a_stop_is_told_to_those_that_wait_and_leaves_nothing(tmp_path, monkeypatch):
    """Else each rank in turn would begin to build what the one before it gave up."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    calls = []

    def stopped(folder):
        (folder / "train.arrow").write_bytes(b"half")
        calls.append(folder)
        raise StopRequested("this rank")

    for _ in range(3):
        with pytest.raises(StopRequested):
            build_once(tmp_path, "key", stopped, lambda: None)
    assert len(calls) == 1
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache\.dir=.*cannot be kept there"):
        build_once(tmp_path / "file" / "cache", "key", lambda folder: {}, lambda: None)


def test_hashes_are_remembered_once_a_file_has_settled(tmp_path, monkeypatch):
    path, root = tmp_path / "f", tmp_path / "cache"
    path.write_text("one")
    first = content_hash(path, root)
    assert not (root / "files").exists(), "it could change within the same tick of the clock"
    path.write_text("two")
    second = content_hash(path, root)
    assert first != second
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    assert content_hash(path, root) == second
    (note,) = (root / "files").iterdir()
    assert note.read_text() == second
    note.write_text("0" * 64)
    assert content_hash(path, root) == "0" * 64, "read from the note, not from the file"
    path.write_text("three")
    assert content_hash(path, root) != "0" * 64
