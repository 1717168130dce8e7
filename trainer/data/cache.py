"""Tokenized rows on disk: built once on a host, found again by what they were made of, never used half built.

<root>/<key>/        a finished entry: `<split>.arrow` for each split, and `manifest.json`, written last
<root>/<key>.lock    held by the process that builds it; the others of the host wait, without a time limit
<root>/<key>.part-*  being built; renamed when it is whole
<root>/<key>.refused why a source was refused, or that a stop was asked for, for the ranks of the same start
<root>/files/        hashes of files that did not change since
<root>/hub/          the versions of hub datasets that were last seen
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from tritune.trainer.errors import InputError, StopRequested

HASH_BYTES = 1 << 26
FORMAT = 3  # of the entries; a change of what rows become raises it
MANIFEST = "manifest.json"
SETTLED_SECONDS = 2.0  # how old a file's last change must be for its hash to be remembered
WAIT_SECONDS = 0.1  # between looks at a lock that another process holds


def cache_root(given: str | None) -> Path:
    """`cache.dir`, else `$TRITUNE_CACHE`, else `~/.cache/tritune`."""
    if given is not None:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("TRITUNE_CACHE") or Path(base) / "tritune")


def key_of(parts: Any) -> str:
    """The name of an entry: SHA-256 of everything that decides what is in it (JSON values)."""
    text = json.dumps([FORMAT, parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_entry(root: Path, key: str) -> tuple[dict[str, pa.Table], dict[str, Any]] | None:
    """The tables of an entry, memory-mapped, and its manifest; None where there is no whole one."""
    folder = root / key
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    tables = {}
    for name, facts in manifest["tables"].items():
        path = folder / f"{name}.arrow"
        if not path.is_file() or path.stat().st_size != facts["num_bytes"]:
            return None
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                tables[name] = reader.read_all()
        except pa.ArrowException:  # damaged: built anew
            return None
    return tables, manifest


def build_once(
    root: Path, key: str, build: Callable[[Path], dict[str, Any]], beat: Callable[[], None]
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Return an entry, building it where it is missing; of several processes on a host one builds and the others wait.

    Args:
        build: writes `<split>.arrow` into the folder it is given and returns the manifest; each table with its size in bytes.
        beat: called again and again while waiting.

    Raises:
        InputError: the folder cannot be written; whatever `build` raises, in each process that waited for it.
        StopRequested: so raised `build` or `beat`; nothing is kept of what was half built.
    """
    found = read_entry(root, key)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{key}.lock").open("a+")
    except OSError as error:
        raise _unwritable(root, error) from None
    with lock, _locked(lock.fileno(), beat):
        found = read_entry(root, key)
        if found is not None:
            return found
        _raise_refusal(root, key)
        try:
            _build(root, key, build)
        except InputError as error:
            _note(root, key, {"value": error.value, "rule": error.rule, "remedy": error.remedy})
            raise
        except StopRequested as error:
            _note(root, key, {"stop": str(error)})
            raise
        except OSError as error:
            if error.errno in (28, 122, 30, 13):  # full, over quota, read-only, forbidden
                raise _unwritable(root, error) from None
            raise
    found = read_entry(root, key)
    assert found is not None, "an entry was renamed into place just now"
    return found


def _build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> None:
    for left in root.glob(f"{key}.part-{socket.gethostname()}-*"):  # a builder of this host that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = root / f"{key}.part-{socket.gethostname()}-{os.getpid()}"
    part.mkdir()
    try:
        manifest = build(part)
        with (part / MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        final = root / key
        if final.exists() and read_entry(root, key) is None:  # damaged since
            shutil.rmtree(final)
        try:
            part.rename(final)
        except OSError:
            if read_entry(root, key) is None:  # else another host was first, on a file system that both see
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(descriptor: int, beat: Callable[[], None]) -> Iterator[None]:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            beat()
            time.sleep(WAIT_SECONDS)
        except OSError as error:
            rule = f"its file system has no locks ({error.strerror})"
            raise InputError("cache.dir", rule, "Give a cache.dir on a disk of this host") from None
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _attempt() -> str | None:
    """What the ranks of one start share: torchrun's names of the run and the restart, and its own process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = (os.environ["TORCHELASTIC_RUN_ID"], os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.getppid())
    return "-".join(str(n) for n in names)


def _note(root: Path, key: str, why: dict[str, str]) -> None:
    """Leave word for the ranks that wait: they need not read the whole source to come to the same end."""
    if _attempt() is not None:
        (root / f"{key}.refused").write_text(json.dumps({"attempt": _attempt(), **why}))


def _raise_refusal(root: Path, key: str) -> None:
    path = root / f"{key}.refused"
    if _attempt() is None or not path.is_file():
        return
    note = json.loads(path.read_text())
    if note["attempt"] != _attempt():
        return
    if "stop" in note:
        raise StopRequested(note["stop"])
    raise InputError(note["value"], note["rule"], note["remedy"])


def _unwritable(root: Path, error: OSError) -> InputError:
    return InputError(
        f"cache.dir={root}", f"tokenized rows cannot be kept there ({error.strerror})", "Give another cache.dir"
    )


def content_hash(path: Path, root: Path, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file; remembered by path, size and times, so that a file that did not change is read once.

    The time of the last change of the inode is among them: a program can set a file's time of writing back, not this one.
    """
    facts = path.stat()
    name = key_of([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino])
    note = root / "files" / name
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    hashed = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                hashed.update(block)
                beat()
    except OSError as error:
        raise InputError(str(path), f"the file cannot be read ({error.strerror})", "Give a file that can be") from None
    digest = hashed.hexdigest()
    if time.time() - facts.st_ctime < SETTLED_SECONDS:  # clocks of file systems tick slowly: it could change unseen
        return digest
    remember(root, note, digest)
    return digest


def remember(root: Path, note: Path, text: str) -> None:
    """Write a small file beside the entries, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(note)
    except OSError as error:
        raise _unwritable(root, error) from None
