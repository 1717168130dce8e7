"""Work on many items in a forked process that the system's limits end: an item that never ends, takes all memory or crashes is
known by its place, and the others are done all the same.

The process serves until it was idle for a while: a fork keeps the pages of its parent as they were, and a trainer changes all of
them. Answers come back as `marshal` has them, plain values that run nothing.
"""

from __future__ import annotations

import marshal
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tritune.trainer.data import isolated

IDLE_SECONDS = 1.0  # a process costs 10 to 20 ms to fork
MOST_ENDED = 2  # items that end the process; each may cost `isolated.CPU_SECONDS`
MOST_DESCRIPTORS = 1 << 12  # where the system does not say which are open
_DESCRIPTORS = Path("/proc/self/fd")
_LOOK_SECONDS = 1.0  # between two looks at a process that says nothing
_MEMORY = 77  # the exit status of a process whose memory ran out


@dataclass(frozen=True)
class Ended:
    """In the place of an item's answer: what ended the process on it."""

    why: str


class EndedTooOftenError(Exception):
    """`MOST_ENDED` items ended the process: what they have in common is at fault."""

    def __init__(self, index: int, why: str) -> None:
        self.index, self.why = index, why
        super().__init__(why)


class Confined(threading.local):
    """`work(item)`, in a process that each thread has of its own; the fork inherits `work`.

    Args:
        work: returns plain values (`marshal` knows them). An exception of it is raised here as a RuntimeError.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work
        self._process: _Process | None = None
        self.ended = 0

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        """Return what `work` gives for each item, in order, or an `Ended`.

        Raises:
            EndedTooOftenError: this was the `MOST_ENDED`th item, since the first call, to end the process.
        """
        done: list[Any] = []
        stop, why = len(items), ""
        while len(done) < len(items):
            asked = items[len(done) : stop]
            answer = self._ask(asked) if asked else []
            if isinstance(answer, _End):  # what was done before it is lost with the process, and asked again
                stop, why = len(done) + answer.index, answer.why
                self.ended += 1
                if self.ended >= MOST_ENDED:
                    raise EndedTooOftenError(stop, why)
                continue
            done += answer
            if len(done) < len(items):
                done.append(Ended(why))
                stop = len(items)
        return done

    def _ask(self, items: Sequence[Any]) -> list[Any] | _End:
        why = ""
        for _ in range(2):  # one that was idle ends just when it is asked
            if self._process is None or not self._process.is_ours():
                self._process = _Process(self._work)
            answer = self._process.ask(items)
            if isinstance(answer, list):
                return answer
            self._process = None
            if answer.index >= 0:
                return answer
            why = answer.why
        raise RuntimeError(f"a process ended twice before it began its work: {why}")


@dataclass(frozen=True)
class _End:
    """index: of the item; -1 where none was begun."""

    index: int
    why: str


class _Process:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._begun = mmap.mmap(-1, 8)  # shared: how many items were begun
        self._owner = os.getpid()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                status = _serve(work, theirs, self._begun)
            finally:
                os._exit(status)
        theirs.close()

    def is_ours(self) -> bool:
        """Whether this process forked it: one that was forked later inherits it and leaves it alone."""
        return self._owner == os.getpid()

    def ask(self, items: Sequence[Any]) -> list[Any] | _End:
        self._begun[:] = bytes(8)
        try:
            answer = self._exchange(pickle.dumps(items, pickle.HIGHEST_PROTOCOL))
        except (EOFError, ConnectionError):
            answer = None
        except BaseException:
            self.close()  # else the next to ask would get this answer
            raise
        if isinstance(answer, str):
            raise RuntimeError(f"a process failed:\n{answer}")
        if answer is not None:
            return answer
        index, status = self._index(), self._end()
        if index >= 0 and self._late:
            return _End(index, f"it did not end within {isolated.WALL_SECONDS:g} s")
        out = os.WIFEXITED(status) and os.WEXITSTATUS(status) == _MEMORY
        return _End(index, isolated.why_ended(status, out))

    def _exchange(self, request: bytes) -> Any:
        """The answer; None where the process is gone, or did not come to the next item for long."""
        self._late = False
        self._pipe.send_bytes(request)
        seen, waited = -1, 0.0  # counted in looks: both processes may have been suspended meanwhile
        while not self._pipe.poll(_LOOK_SECONDS):
            if self._index() != seen:
                seen, waited = self._index(), 0.0
            elif (waited := waited + _LOOK_SECONDS) >= isolated.WALL_SECONDS:
                self._late = True
                return None
        return marshal.loads(self._pipe.recv_bytes())

    def _index(self) -> int:
        return int.from_bytes(self._begun[:], "little") - 1

    def _end(self) -> int:
        """How it ended, killed where it has not; its wait status."""
        self._pipe.close()
        if not self._late:  # its pipe is closed, and it is about to end by itself, which says more than our signal
            for _ in range(100):
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    self._pid = 0
                    return status
                time.sleep(0.01)
        os.kill(self._pid, signal.SIGKILL)
        status = os.waitpid(self._pid, 0)[1]
        self._pid = 0
        return status

    def close(self) -> None:
        self._pipe.close()
        if self._pid and self.is_ours():
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
            self._pid = 0

    def __del__(self) -> None:
        if hasattr(self, "_pid"):
            self.close()


def _close_all_but(number: int) -> None:
    """A limit of a billion descriptors, as containers have it, would take minutes to go through one by one."""
    opened = [int(name) for name in os.listdir(_DESCRIPTORS)] if _DESCRIPTORS.is_dir() else range(MOST_DESCRIPTORS)
    for other in opened:
        if other > 2 and other != number:
            with suppress(OSError):
                os.close(other)


def _serve(work: Callable[[Any], Any], pipe: Connection, begun: mmap.mmap) -> int:
    """The process: requests are answered one by one until none comes any more. Returns its exit status."""
    _close_all_but(pipe.fileno())  # the run directory's lock, other pipes: nothing is held open here
    isolated.confine()
    isolated.watch()
    try:
        while pipe.poll(IDLE_SECONDS):
            isolated.rewind()
            items = pickle.loads(pipe.recv_bytes())
            answers = []
            for index, item in enumerate(items, 1):
                begun[:] = index.to_bytes(8, "little")
                isolated.rewind()
                answers.append(work(item))
            isolated.rewind()
            pipe.send_bytes(marshal.dumps(answers))
    except (EOFError, ConnectionError):
        return 0
    except Exception as error:  # noqa: BLE001  said by the process that asked
        if isolated.ran_out(error):
            return _MEMORY
        pipe.send_bytes(marshal.dumps(traceback.format_exc()))
    return 0
