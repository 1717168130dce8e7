"""What the ranks of this machine say of themselves, read from outside: signs of life, errors, stacks; and whose fault it is."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritune.trainer.run.pulse import DUMP_SIGNAL, proc_stat, start_ticks

SUSPENDED_SECONDS = 5.0  # the launcher looks five times a second, unless it is stopped itself
DUMP_SECONDS = 3.0  # how long a rank may take to write its stacks
# A rank that says this only lost another one.
SECONDARY = ("PeerError", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process",
             "NCCL communicator was aborted", "Timed out waiting", "recv, ", "Connection refused",
             "BarrierTimeout")  # fmt: skip
# Innermost frames of a rank that waits for others rather than holds them up.
# With NCCL the wait is where the GPU's result is read.
WAITING = ("torch/distributed/", "trainer/parallel/distributed.py", "torch/autograd/graph.py", "torch/cuda/",
           "trainer/metrics/meter.py", "trainer/backends/")  # fmt: skip
FRAME = re.compile(r'^\s*File "(?P<file>[^"\n]+)", line (?P<rest>\d.*)$', re.MULTILINE)  # as faulthandler writes it


@dataclass(frozen=True)
class Rank:
    """The last sign of a rank. `due`: of the clock that all processes of a machine share, `time.monotonic`."""

    rank: int
    pid: int
    started: str | None
    phase: str
    step: int
    allowed: float
    due: float

    def alive(self) -> bool:
        stat = proc_stat(self.pid)
        return stat is not None and stat[0] != "Z" and stat[19] == self.started

    def stopped(self) -> bool:
        stat = proc_stat(self.pid)
        return stat is not None and stat[0] in "Tt" and stat[19] == self.started

    def signal(self, number: int) -> None:
        if start_ticks(self.pid) == self.started:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(frozen=True)
class Culprit:
    """Who made a run fail. `weight` orders the candidates: the smallest, then the earliest, is to blame."""

    weight: int
    time: float
    rank: int | None
    text: str


def ranks(folder: Path) -> list[Rank]:
    """The ranks that have begun, in their order."""
    found = []
    for path in folder.glob("rank-*.pulse"):
        text = path.read_text()
        with suppress(ValueError):  # made, not yet written
            found.append(Rank(**json.loads(text)))
    return sorted(found, key=lambda r: r.rank)


def died(folder: Path, seen: list[Rank], host: str) -> list[Culprit]:
    """The ranks that ended badly: by an error of their own, or without a word, which a signal does."""
    culprits = []
    for rank in seen:
        note = folder / f"rank-{rank.rank}.error"
        where = f"rank {rank.rank} on {host}"
        if note.is_file():
            said = json.loads(note.read_text())
            weight = 3 if any(word in said["error"] for word in SECONDARY) else 2
            culprits.append(Culprit(weight, said["time"], rank.rank, f"{where}: {said['error']}"))
        elif rank.phase != "ended" and not rank.alive():
            text = f"{where} (pid {rank.pid}) died without a word in phase {rank.phase} after step {rank.step}"
            culprits.append(Culprit(1, time.time(), rank.rank, text))
    return culprits


class Patience:
    """Decides when a rank hangs: no sign in the time that it gave itself, or stopped for so long, whatever it does.

    Args:
        seconds: how long a rank may be stopped by a signal; and how long all have after this process itself slept, as it does
            when a scheduler suspends a whole job.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stopped: dict[int, float] = {}
        self._looked = time.monotonic()
        self._not_before = 0.0

    def overdue(self, seen: list[Rank]) -> list[Rank]:
        """The ranks that hang; to be asked every second or more often."""
        now = time.monotonic()
        if now - self._looked > SUSPENDED_SECONDS:
            self._not_before = now + self._seconds
            self._stopped = {}
        self._looked = now
        stopped = {r.rank for r in seen if r.stopped()}
        self._stopped = {rank: self._stopped.get(rank, now) for rank in stopped}
        if now < self._not_before:
            return []
        late = [r for r in seen if r.phase != "ended" and r.due < now and r.alive()]
        return late or [r for r in seen if now - self._stopped.get(r.rank, now) > self._seconds]


def dump_stacks(folder: Path, seen: list[Rank], into: Path) -> None:
    """Let every rank write its stacks, also one that is stopped, into `into/rank-<r>.stacks`."""
    before = {r.rank: _size(folder / f"rank-{r.rank}.stacks") for r in seen}
    for rank in seen:
        rank.signal(DUMP_SIGNAL)
        if rank.stopped():
            rank.signal(signal.SIGCONT)  # its first act is to follow the signal before it
    deadline = time.monotonic() + DUMP_SECONDS
    last = dict(before)
    while time.monotonic() < deadline:
        time.sleep(0.2)  # several threads are written one after the other: a text that still grows is not whole
        now = {r.rank: _size(folder / f"rank-{r.rank}.stacks") for r in seen}
        if now == last and all(now[r.rank] > before[r.rank] or not r.alive() for r in seen):
            break
        last = now
    into.mkdir(parents=True, exist_ok=True)
    for rank in seen:
        path = folder / f"rank-{rank.rank}.stacks"
        if path.is_file():
            (into / path.name).write_bytes(path.read_bytes()[before[rank.rank] :])


def blame_for_hang(seen: list[Rank], stopped: set[int], stacks: Path, host: str) -> list[Culprit]:
    """Which rank holds the others up: one that is stopped; else one that is behind; else one that waits for no other."""
    culprits = []
    last = max((r.step for r in seen), default=0)
    for rank in seen:
        path = stacks / f"rank-{rank.rank}.stacks"
        frame = innermost(path.read_text(errors="replace") if path.is_file() else "")
        where = f"rank {rank.rank} on {host} (pid {rank.pid})"
        tail = f"in phase {rank.phase} after step {rank.step}, allowed {rank.allowed:g} s "
        tail += f"(launch.hang_seconds, quiet_seconds); its stacks: {path}"
        if rank.rank in stopped:
            culprits.append(Culprit(0, time.time(), rank.rank, f"{where} was stopped (SIGSTOP or a debugger) {tail}"))
        elif not frame:
            culprits.append(Culprit(1, time.time(), rank.rank, f"{where} hung and wrote no stacks {tail}"))
        elif not any(word in frame for word in WAITING) or rank.step < last:
            culprits.append(Culprit(2, time.time(), rank.rank, f"{where} hung at {frame} {tail}"))
        else:
            culprits.append(Culprit(4, time.time(), rank.rank, f"{where} waited at {frame} {tail}"))
    return culprits


def innermost(stacks: str) -> str:
    """The innermost frame of the main thread, from faulthandler's text: `file:line in function`; empty without one."""
    # faulthandler writes the thread that got the signal as the current one; Python's main thread gets all signals. A text
    # that was cut, or two that were written into one another, may hold no whole line of it: then any thread's line is better
    # than none, and none is no reason to lose the report.
    threads = [t for t in stacks.split("\n\n") if FRAME.search(t)]
    current = [t for t in threads if t.startswith("Current thread")]
    frame = FRAME.search((current or threads[-1:] or [""])[0])
    return f"{frame['file']}:{frame['rest']}" if frame else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
