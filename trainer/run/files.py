"""Reading what a run directory holds: files that a crash, a full disk or a hand may have spoilt since they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from tritune.trainer.config.yaml_file import read_mapping
from tritune.trainer.errors import InputError
from tritune.trainer.regular import read_regular

MOST_BYTES = 1 << 30  # of one file: the log of a step is some 300 bytes
# What is written there beside folders; a start appends to some of them and replaces the others.
FILES = ("config.yaml", "environment.json", "content.json", "data.json", "status.json", "metrics.jsonl", "evaluations.jsonl",
         "base.json", "samples.json", "summary.json", "report.html", "train.log", "rejects.jsonl", "startup.json",
         "attempts.jsonl", "lock.json")  # fmt: skip
MISREAD = (OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError)

T = TypeVar("T", dict, list)


def require_files(run: Path) -> None:
    """Refuse a run directory in which something else has the name of a file of ours: a FIFO would make the run wait.

    Raises:
        InputError: it names the first.
    """
    for name in FILES:
        path = run / name
        if (path.exists() or path.is_symlink()) and not path.is_file():
            raise InputError(str(path), "it is no regular file", "Move it away, or give another run.dir")


def read_json(path: Path, kind: type[T], remedy: str) -> T | None:
    """What a JSON file of a run holds, a `dict` or a `list`; None where there is none.

    Raises:
        InputError: it is spoilt; `remedy` says what to do about it.
    """
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        found = json.loads(read_regular(path, MOST_BYTES))
    except MISREAD as error:
        raise _spoilt(path, f"{type(error).__name__}", remedy) from None
    if not isinstance(found, kind):
        raise _spoilt(path, f"it holds {type(found).__name__}, not {kind.__name__}", remedy)
    return found


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSONL log, and how many lines are none; one that a kill cut short, at the end, is not counted.

    Raises:
        InputError: it is no regular file, or too long.
    """
    lines, rows, spoilt = read_lines(path), [], 0
    for line in lines:
        row = row_of(line)
        if row is not None:
            rows.append(row)
        elif line.endswith("\n"):
            spoilt += 1
    return rows, spoilt


def read_lines(path: Path) -> list[str]:
    """The lines of a text file with their ends; none where there is no file.

    Raises:
        InputError: it is no regular file, or too long.
    """
    if not (path.exists() or path.is_symlink()):
        return []
    try:
        return read_regular(path, MOST_BYTES).decode(errors="replace").splitlines(True)
    except MISREAD as error:
        raise _spoilt(path, type(error).__name__, "Move it away, or give another run.dir") from None


def row_of(line: str) -> dict[str, Any] | None:
    """A whole line of a log; None where it is no JSON object."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except MISREAD:
        return None
    return row if isinstance(row, dict) else None


def read_config(run: Path) -> dict[str, Any] | None:
    """The configuration that a run was started with, as it was written; None where there is none.

    Raises:
        InputError: it is spoilt.
    """
    path = run / "config.yaml"
    if not (path.exists() or path.is_symlink()):
        return None
    remedy = "Move it away: a start with the run's own overrides writes it anew, and each checkpoint knows its run"
    try:
        found = read_mapping(path)
    except InputError as error:
        raise _spoilt(path, error.rule, remedy) from None
    if not found:
        raise _spoilt(path, "it holds no configuration", remedy)
    return found


def _spoilt(path: Path, why: str, remedy: str) -> InputError:
    return InputError(str(path), f"the file is spoilt ({why})", remedy)
