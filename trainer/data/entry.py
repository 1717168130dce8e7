"""A finished entry of the cache: its tables, what was hashed of them, and the manifest that makes it one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from tritune.trainer.data.examples import SCHEMA, DataReport
from tritune.trainer.data.seal import Damaged, Facts, Guard, open_sealed, seal_path, write_seal
from tritune.trainer.errors import DamagedRows
from tritune.trainer.regular import open_regular, read_regular

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 28  # it lists the files that a source was read from; a longer one was written by nobody here
# What JSON and lists raise that are not what they should be, and Arrow of a file that somebody made.
MISREAD = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    pa.ArrowException,
)


@dataclass(frozen=True)
class Entry:
    """One split of one source.

    Attributes:
        guard: watches over the values of the tokens, which are not looked at when the entry is opened.
    """

    table: pa.Table
    digest: str
    report: DataReport
    guard: Guard


def write_manifest(folder: Path, key: str, content: dict[str, Any]) -> None:
    """Hash what was written into a folder, and make it an entry.

    Args:
        content: with `tables`: by split, `digest` and `report`.
    """
    tables = {n: facts | {"file": asdict(write_seal(folder / f"{n}.arrow"))} for n, facts in content["tables"].items()}
    for name in tables:
        _sync(seal_path(folder / f"{name}.arrow"))
    others = [p for p in sorted(folder.iterdir()) if p.suffix not in (".arrow", ".seal")]
    content = {"key": key, **content, "tables": tables, "files": {p.name: _hash(p) for p in others}}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)


def read_entry(folder: Path, key: str) -> dict[str, Entry] | None:
    """The tables of an entry, memory-mapped; None where there is nothing.

    Raises:
        Damaged: there is something, and it is not what was written.
    """
    if not os.path.lexists(folder):
        return None
    try:
        manifest = json.loads(read_regular(folder / MANIFEST, MANIFEST_BYTES))
        if manifest.pop("sha256") != _digest(manifest) or manifest["key"] != key:
            raise Damaged(f"{MANIFEST} changed after it was written (SHA-256 differs)")
        for name, digest in manifest["files"].items():
            if Path(name).name != name or _hash(folder / name) != digest:
                raise Damaged(f"{name} changed after it was written (SHA-256 differs)")
        return {name: _open(folder, name, facts) for name, facts in manifest["tables"].items()}
    except OSError as error:
        raise Damaged(f"{Path(error.filename or MANIFEST).name}: {error.strerror}") from None
    except MISREAD as error:
        raise Damaged(f"it does not read ({type(error).__name__})") from None


def _open(folder: Path, name: str, facts: dict[str, Any]) -> Entry:
    if re.fullmatch(r"\w+", name) is None:
        raise Damaged(f"{MANIFEST} names a table {name!r}")
    table, guard = open_sealed(folder / f"{name}.arrow", Facts(**facts["file"]), _spoiled(folder))
    table.validate()
    if table.schema != SCHEMA:
        raise Damaged(f"{name}.arrow has other columns")
    return Entry(table, facts["digest"], _report(facts["report"]), guard)


def _spoiled(folder: Path) -> Callable[[str], NoReturn]:
    """What is done when a token turns out to have changed: the entry is none any more, so that the next start builds it."""

    def raise_it(what: str) -> NoReturn:
        remedy = "Start again: the rows are read anew, and a run goes on from its newest checkpoint"
        try:
            (folder / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            remedy = f"Remove that folder, which this process may not ({error.strerror}), and start again"
        raise DamagedRows(f"cache {folder}", f"{what} after it was written, and holds other tokens now", remedy)

    return raise_it


def _report(values: dict[str, Any]) -> DataReport:
    report = DataReport(**values)
    for one in fields(report):
        if type(getattr(report, one.name)) is not type(getattr(DataReport(), one.name)):
            raise Damaged(f"{MANIFEST} has {one.name}={getattr(report, one.name)!r}")
    return report


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
