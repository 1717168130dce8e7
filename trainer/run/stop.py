"""Requests to stop -> a stop that all ranks agree on: after the running step, or before the next piece of what has no steps."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tritune.trainer.errors import InputError, StopRequested
from tritune.trainer.parallel.distributed import World
from tritune.trainer.run.directory import STOP_FILE
from tritune.trainer.run.interrupted import SIGNALS

_BY_FILE = 1 << 16  # above every signal's number
_BY_FAULT = 1 << 17  # what is wrong goes before what is asked for
LOOK_SECONDS = 1.0  # between looks for the file within a rank's own work: a file system that all share is spared


class Stop:
    """Catches SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless it is ignored, as under `nohup`), and looks for the file.

    The handler only sets a flag: printing in one can fail as re-entrant.
    A second SIGINT ends the process at once, as an impatient user expects.
    """

    def __init__(self) -> None:
        self._caught = 0
        self._file: Path | None = None
        self._started, self._looked, self._leads = 0.0, 0.0, True

    def install(self) -> Stop:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._catch)
        return self

    def watch(self, directory: Path, started: float, leads: bool = True) -> None:
        """Look for the file in a run directory from now on.

        Args:
            started: seconds since 1970; a file from before was not meant for this start, and goes.
            leads: whether this rank looks for all after each step; the others do within work of their own, and only then.

        Raises:
            InputError: something that is no file has its name.
        """
        self._file, self._started, self._leads = directory / STOP_FILE, started, leads
        if leads and self._file.exists() and not self._file.is_file():
            raise InputError(str(self._file), "it is no file, and a file of that name asks a run to stop", "Remove it")
        if leads and self._file.exists() and self._file.stat().st_mtime < started:
            self._file.unlink()

    def agreed(self, world: World, fault: Exception | None = None) -> str | None:
        """What any rank was stopped by, the same on all ranks: a signal's name, or `the file STOP`; None to go on.

        Args:
            fault: of this rank alone, which is to end all of them: raised here, and as `PeerError` on the others.
        """
        if self._leads:
            self._look()
        number = world.max(_BY_FAULT if fault is not None else self._caught)
        if number == _BY_FAULT:
            with world.raise_on_all("reading the next rows"):
                if fault is not None:
                    raise fault
        return self.name(number) if number else None

    def heed(self, world: World) -> None:
        """Between two pieces of work that all ranks do in step.

        Raises:
            StopRequested: on all ranks, named by what asked.
        """
        by = self.agreed(world)
        if by is not None:
            raise StopRequested(by)

    def interrupt(self) -> None:
        """Within work that this rank does alone; what follows on it is to `heed`, so that the others learn of it.

        Raises:
            StopRequested: this rank was asked.
        """
        if not self._caught and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        if self._caught:
            raise StopRequested("this rank")

    def seen(self) -> int:
        """What this rank knows of a request, for a thread beside the main one, where that does not look; 0 for none."""
        if not self._caught and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        return self._caught

    def tell_others(self) -> None:
        """Hand a signal that perhaps this rank alone got on to the others, by the file that all look for."""
        if self._file is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._file.touch()

    @staticmethod
    def name(number: int) -> str:
        """A request as a user knows it."""
        return f"the file {STOP_FILE}" if number == _BY_FILE else signal.Signals(number).name

    def forget(self) -> None:
        """The request was followed: the next run of this directory is not to meet it."""
        if self._file is not None and self._leads:
            self._file.unlink(missing_ok=True)

    def _look(self) -> None:
        """Once the file was seen it was asked for, though it should go: other ranks may follow it already."""
        self._looked = time.monotonic()
        if self._caught or self._file is None or not self._file.exists():
            return
        with suppress(FileNotFoundError):
            if self._leads or self._file.stat().st_mtime >= self._started:
                self._caught = _BY_FILE

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = number
