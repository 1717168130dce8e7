"""Tokenized rows on disk: built once on a host, found again by what they were made of, never used half built.

<root>/<key>/        a finished entry: `<split>.arrow` for each split with its hashes in `<split>.seal`, `rejects.jsonl`, and
                     `manifest.json`, written last
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

from tritune.trainer.data.entry import Entry, read_entry, write_manifest
from tritune.trainer.data.seal import Damaged
from tritune.trainer.errors import InputError, StopRequested
from tritune.trainer.regular import open_regular, read_regular

HASH_BYTES = 1 << 26
FORMAT = 6  # of the entries; a change of what rows become raises it
NOTE_BYTES = 1 << 20  # what this process reads of a note that another left
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


def build_once(
    root: Path, key: str, build: Callable[[Path], dict[str, Any]], beat: Callable[[], None],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Entry]:  # fmt: skip
    """Return an entry, building it where it is missing or not what was written; of several processes on a host one builds and
    the others wait.

    Args:
        build: writes `<split>.arrow` into the folder it is given and returns the manifest's content, `tables` among it.
        beat: called again and again while waiting.
        say: is told what is wrong with an entry that is built anew.

    Raises:
        InputError: the folder cannot be written; whatever `build` raises, in each process that waited for it.
        StopRequested: so raised `build` or `beat`; nothing is kept of what was half built.
    """
    found = _find(root, key, say)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{key}.lock").open("a+")
    except OSError as error:
        raise _unwritable(root, error) from None
    with lock, _locked(lock.fileno(), beat):
        found = _find(root, key)
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
    found = _find(root, key)
    assert found is not None, "an entry was renamed into place just now"
    return found


def _find(root: Path, key: str, say: Callable[[str], None] = lambda text: None) -> dict[str, Entry] | None:
    """An entry; None where there is no whole one, of which `say` is told."""
    try:
        return read_entry(root / key, key)
    except Damaged as error:
        say(f"cache     {root / key} is damaged and not used: {error}. Its rows are read anew")
        return None


def _build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> None:
    for left in root.glob(f"{key}.part-{socket.gethostname()}-*"):  # a builder of this host that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = root / f"{key}.part-{socket.gethostname()}-{os.getpid()}"
    part.mkdir()
    try:
        write_manifest(part, key, build(part))
        final = root / key
        if os.path.lexists(final) and _find(root, key) is None:  # damaged since
            _remove(final)
        try:
            part.rename(final)
        except OSError:
            if _find(root, key) is None:  # else another host was first, on a file system that both see
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove(path: Path) -> None:
    """Whatever stands there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
    if _attempt() is None:
        return
    try:
        note = json.loads(read_regular(root / f"{key}.refused", NOTE_BYTES))
        if note["attempt"] != _attempt():
            return
        refusal = InputError(str(note.get("value")), str(note.get("rule")), str(note.get("remedy")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # there is none, or one that says nothing: the source itself will show
    if "stop" in note:
        raise StopRequested(str(note["stop"]))
    raise refusal


def _unwritable(root: Path, error: OSError) -> InputError:
    rule = f"tokenized rows cannot be kept there ({error.strerror or error})"
    return InputError(f"cache.dir={root}", rule, "Give another cache.dir")


def content_hash(path: Path, root: Path, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file; remembered by path, size and times, so that a file that did not change is read once.

    The time of the last change of the inode is among them: a program can set a file's time of writing back, not this one.
    """
    facts = path.stat()
    name = key_of([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino])
    note = root / "files" / name
    if (known := recall(note)) is not None:
        return known
    hashed = hashlib.sha256()
    try:
        with open_regular(path) as file:
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


def recall(note: Path) -> str | None:
    """What `remember` wrote; None where there is nothing, or it changed since."""
    try:
        text, _, vouched = read_regular(note, NOTE_BYTES).decode().rpartition(" ")
    except (OSError, ValueError):
        return None
    return text if vouched == _vouched(note.name, text) else None


def _vouched(name: str, text: str) -> str:
    return hashlib.sha256(f"{name} {text}".encode()).hexdigest()[:16]


def remember(root: Path, note: Path, text: str) -> None:
    """Write a small file beside the entries, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(f"{text} {_vouched(note.name, text)}")
        part.replace(note)
    except OSError as error:
        raise _unwritable(root, error) from None
