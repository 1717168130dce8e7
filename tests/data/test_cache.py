"""The cache: one builds and the others wait, killed builders leave nothing that is used, whatever changes is built anew."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tritune.trainer.config import Config
from tritune.trainer.data import cache
from tritune.trainer.data.cache import build_once, content_hash
from tritune.trainer.data.entry import read_entry
from tritune.trainer.data.examples import Columns
from tritune.trainer.data.seal import Damaged
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
    (entry,) = build_once(root, "key", lambda folder: build_slowly(folder, seconds, log), lambda: None).values()
    ok = entry.table["ids"].to_pylist() == [[1, 2, 3]] and entry.report.rows == 1
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
    assert read_entry(root / "key", "key") is None
    assert waiting.is_alive(), "it waits for the lock"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(20)
    waiting.join(20)
    assert waiting.exitcode == 0, "the kernel gave the lock up with the process"
    assert len(log.read_text().splitlines()) == 2
    assert not list(root.glob("*.part-*")), "its folder is gone too"


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _reseal(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A manifest of another hand, whose own hash is right."""

    def forge(path: Path) -> None:
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        change(manifest)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest | {"sha256": digest}))

    return forge


TABLES, MANIFEST = ("train.arrow", "train.seal", "rejects.jsonl"), "manifest.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{how} {name}": (name, damage) for name in (*TABLES, MANIFEST) for how, damage in {
        "missing": Path.unlink,
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "a FIFO": _fifo,
        "a folder": _folder,
        "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    }.items()},
    **{f"zeros in {name}": (name, lambda path: path.write_bytes(bytes(path.stat().st_size))) for name in TABLES[:2]},
    **{f"a manifest of {text[:9]!r}": (MANIFEST, lambda path, text=text: path.write_bytes(text.encode("latin1"))) for text in
       ("", "{}", "[]", "null", "[" * 100_000, "\xff\xfe", "1" * 5000, '{"sha256": 1}')},
    **{f"forged {name}": (MANIFEST, _reseal(change)) for name, change in {
        "key": lambda m: m.update(key="another"),
        "tables": lambda m: m.update(tables=[]),
        "name": lambda m: m["tables"].update({"../x": m["tables"]["train"]}),
        "file": lambda m: m["files"].update({"../../log": "0" * 64}),
        "size": lambda m: m["tables"]["train"]["file"].update(num_bytes="x"),
        "ranges": lambda m: m["tables"]["train"]["file"].update(num_ranges=10**30),
        "report": lambda m: m["tables"]["train"].update(report=None),
        "count": lambda m: m["tables"]["train"]["report"].update(rows=True),
        "field": lambda m: m["tables"]["train"]["report"].update(x=1),
    }.items()},
    "a file for the entry": (".", lambda path: (shutil.rmtree(path), path.write_text(""))),
    "a dangling link for the entry": (".", lambda path: (shutil.rmtree(path), path.symlink_to("/nowhere"))),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_anew_and_that_is_said(tmp_path, damage):
    root, log, said = tmp_path / "cache", tmp_path / "log", []
    (name, spoil), folder = DAMAGES[damage], root / "key"

    def entry():
        return build_once(root, "key", lambda folder: build_slowly(folder, 0.0, log), lambda: None, said.append)

    entry()
    spoil(folder / name)
    with pytest.raises(Damaged):
        read_entry(folder, "key")
    assert entry()["train"].table["ids"].to_pylist() == [[1, 2, 3]]
    assert len(log.read_text().splitlines()) == 2
    (line,) = said
    assert str(folder) in line
    assert "is damaged and not used" in line
    entry()
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["", '{"attempt": "a', "[]", "null", "{}", "[" * 100_000, "\xff", "{}{}"])
def test_notes_of_refusals_that_say_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    (tmp_path / "key.refused").write_bytes(text.encode("latin1"))
    built = build_once(tmp_path, "key", lambda folder: build_slowly(folder, 0.0, tmp_path / "log"), lambda: None)
    assert built["train"].report.rows == 1


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
    kept = note.read_text()
    assert kept.startswith(second)
    monkeypatch.setattr(cache, "open_regular", lambda path: pytest.fail("the file is not read again"))
    assert content_hash(path, root) == second
    monkeypatch.undo()
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    for spoiled in (b"", b"0" * 64, b"\xff" * 64, kept.replace(second[:8], first[:8], 1).encode()):
        note.write_bytes(spoiled)
        assert content_hash(path, root) == second, spoiled
        assert note.read_text() == kept
    path.write_text("three")
    assert content_hash(path, root) != second
