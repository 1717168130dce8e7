"""How one rank's end is told: to the other ranks by the one that ends, and to the user by those that lost it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tritune.trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, InputError
from tritune.trainer.shown import shown

RELEASE_SECONDS = 2.0  # a process that is killed lets its connections go before its lock, in a save long before


def last_word(code: int, culprit: str | None) -> str | None:
    """What the other ranks are told of this one's end: None where it is no failure."""
    if code in (EXIT_DONE, EXIT_STOPPED):
        return None
    return f"{InputError.__name__ + ': ' if code == EXIT_INPUT else ''}{culprit or 'it ended'}"


def status_of(lost: str) -> int:
    """The exit status for those that lost a rank: a fault of the user's ends all of them as one."""
    return EXIT_INPUT if InputError.__name__ in lost else EXIT_FAILED


def tell_without(lost: str, run: Path | None) -> None:
    """Say who was lost, once on each machine but the first; and in the status of `run`, if the one who writes it was."""
    if os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
        print(f"tritune: rank {os.environ['RANK']}: {shown(lost)}", file=sys.stderr)
    if run is not None:
        from tritune.trainer.checkpoint.names import newest_step
        from tritune.trainer.run.directory import is_owned, note_death

        deadline = time.monotonic() + RELEASE_SECONDS
        while is_owned(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(OSError):
            if not is_owned(run):
                note_death(run, newest_step(run / "checkpoints"), status_of(lost), lost)
