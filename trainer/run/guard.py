"""Ends a rank that was asked to stop and cannot follow, or whose compilation goes on for too long.

A forward, a compiler, an export or a collective holds the main thread for as long as it likes, and Python runs a signal's handler
only between two of its steps. A thread of its own hears of the signal through a pipe that the C handler writes to.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tritune.trainer.run.interrupted import SIGNALS
from tritune.trainer.run.stop import Stop

FOLLOW_SECONDS = 4.0  # that a stop is left to be followed in good order; with the looks, a process is gone within ten
LOOK_SECONDS = 0.5
# Where a stop waits for its turn: a step, a validation or a save is finished, since ending it would lose what was trained.
PATIENT = ("train", "evaluate", "save", "ended")


@dataclass(frozen=True)
class Limit:
    """How long a phase may take, and what is said where it takes longer."""

    seconds: float
    why: str


class Guard:
    """One thread beside the main one.

    Args:
        stop: knows of the file STOP, and hands a signal that only this rank got on to the others by it.
        phase: where the rank is, as `Pulse` says.
        end: called on this thread with why, and whether that was a request to stop; it is to end the process.
        limits: of phases that may not go on for ever.
    """

    def __init__(
        self, stop: Stop, phase: Callable[[], str], end: Callable[[str, bool], None], limits: dict[str, Limit]
    ) -> None:
        self._stop, self._phase, self._end, self._limits = stop, phase, end, limits
        self._closed = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(LOOK_SECONDS)
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget_in_child)
        self._thread = threading.Thread(target=self._watch, name="tritune-guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the signals' pipe back to whoever had it."""
        self._closed.set()
        signal.set_wakeup_fd(self._before)
        self._writer.send(b"\0")  # the thread need not wait for its next look
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _forget_in_child(self) -> None:
        """A signal to a forked process is not for this one, whose pipe it has."""
        if not self._closed.is_set():
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        caught, seen, entered, asked = 0, "", time.monotonic(), 0.0
        while not self._closed.is_set():
            caught = self._hear() or caught
            now, phase = time.monotonic(), self._phase()
            if phase != seen:
                seen, entered = phase, now
            if phase in PATIENT:
                asked = 0.0
                continue
            caught = caught or self._stop.seen()
            asked = asked or (now if caught else 0.0)
            if asked and now - asked > FOLLOW_SECONDS:
                self._stop.tell_others()
                self._end(self._stop.name(caught), True)
            limit = self._limits.get(phase)
            if limit is not None and now - entered > limit.seconds:
                self._end(limit.why, False)

    def _hear(self) -> int:
        """The number of a signal that asks to stop, or 0; waits a moment for one."""
        try:
            return next((number for number in self._reader.recv(4096) if number in SIGNALS), 0)
        except TimeoutError:
            return 0
