"""After an attempt: what is written down of it, and whether there is to be another."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.checkpoint.names import newest_step
from tritune.trainer.config.launch import LaunchConfig
from tritune.trainer.errors import EXIT_DONE, EXIT_INPUT, EXIT_STOPPED
from tritune.trainer.run.directory import note_death, now
from tritune.trainer.shown import shown

LOG = "attempts.jsonl"
MAX_BACKOFF = 600.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        code: 0 done, 2 wrong input, 75 stopped on request with a checkpoint, 1 anything else.
        culprit: who made it fail, as a line.
        asked: the signal that asked this launcher for a stop, if one did.
    """

    code: int
    culprit: str | None = None
    asked: str | None = None

    @property
    def crashed(self) -> bool:
        return self.code not in (EXIT_DONE, EXIT_INPUT, EXIT_STOPPED)


def record(run: Path, attempt: str, outcome: Outcome, limits: LaunchConfig) -> float | None:
    """Add a row to `attempts.jsonl`; return after how many seconds to try again, None for never.

    A crash is tried again unless `max_restarts` were in vain before it: crashes in a row between which no checkpoint came.
    """
    path = run / LOG
    before = _rows(path)
    saved = newest_step(run / "checkpoints")
    in_vain = 0
    for row in reversed(before):
        if not (row["crashed"] and row["saved"] == saved):
            break
        in_vain += 1
    wait = None
    if outcome.crashed and outcome.asked:
        wait = 0.0  # ended by the scheduler's own signals, which says nothing against the run
    elif outcome.crashed and in_vain < limits.max_restarts:
        wait = min(limits.backoff_seconds * 2**in_vain, MAX_BACKOFF)
    row = {"time": now(), "attempt": attempt, "code": outcome.code, "crashed": outcome.crashed and not outcome.asked,
           "asked": outcome.asked, "saved": saved, "culprit": outcome.culprit, "again_after": wait}  # fmt: skip
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if outcome.crashed:
            note_death(run, saved, outcome.code, outcome.culprit)
    except OSError as error:  # a full disk may be what ended the attempt
        print(f"tritune: {error.filename or path} could not be written: {error.strerror}", file=sys.stderr)
    return wait


def _rows(path: Path) -> list[dict[str, Any]]:
    """The attempts before; a row that was cut short, or is none, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and {"crashed", "saved"} <= row.keys():
                rows.append(row)
    return rows


def say_end(outcome: Outcome, wait: float | None, run: Path) -> None:
    """The last line a user reads of an attempt that failed: who, and what comes now."""
    if outcome.culprit is None:
        return
    then = "the same command goes on from its newest checkpoint" if wait is None else f"again in {wait:g} s"
    print(f"tritune: {shown(outcome.culprit)}\ntritune: {run} failed; {then}", file=sys.stderr, flush=True)
