"""Signals -> a stop that all ranks agree on, after the running step."""

from __future__ import annotations

import signal
from types import FrameType

from tritune.trainer.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Catches SIGTERM, SIGINT and SIGUSR1. The handler only sets a flag: printing in one can fail as re-entrant.

    A second SIGINT ends the process at once, as an impatient user expects.
    """

    def __init__(self) -> None:
        self._caught = 0

    def install(self) -> Stop:
        for number in SIGNALS:
            signal.signal(number, self._catch)
        return self

    def agreed(self, world: World) -> str | None:
        """The name of the signal that any rank caught, the same on all ranks; None to go on."""
        number = world.any(self._caught)
        return signal.Signals(number).name if number else None

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = number
