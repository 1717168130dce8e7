"""Signs of life, one file a rank, for a watchdog outside the process, which a stopped or blocked one cannot fool.

The launcher names a folder on this machine in `TRITUNE_NODE_DIR`; without it nothing is written. There lie, of rank r:

    rank-<r>.pulse   the last sign (JSON): where the rank is, and by when the next sign is due
    rank-<r>.error   what it failed with, and when (JSON)
    rank-<r>.stacks  the stack of every thread, each time the rank gets SIGUSR2
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import statistics
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

NODE_DIR = "TRITUNE_NODE_DIR"
DUMP_SIGNAL = signal.SIGUSR2
SIZE = 512  # bytes of a sign; written over the last one at once, so that a reader never sees half of it
FIRST_STEPS = 3  # they compile kernels and allocate: their time says nothing of later ones
_PR_SET_PDEATHSIG = 1
LAUNCHED = "TRITUNE_LAUNCHED"  # when the launcher was started, on the clock that all processes of a machine share

_marks: list[tuple[str, float]] = []


def begin(name: str) -> None:
    """A part of the start-up begins; `config` is the first."""
    if name == "config":
        _marks.clear()
    _marks.append((name, time.monotonic()))


def startup() -> dict[str, float]:
    """Seconds of each part of the start-up, from the launcher's first to the end of the first step."""
    now, born = time.monotonic(), process_birth()
    launched = os.environ.get(LAUNCHED)
    marks = [("launcher", float(launched)), ("interpreter", born)] if launched else [("interpreter", born)]
    marks += _marks
    ends = [at for _, at in marks[1:]] + [now]
    parts: dict[str, float] = {}
    for (name, at), end in zip(marks, ends, strict=True):
        parts[name] = round(parts.get(name, 0.0) + end - at, 3)
    return {**parts, "total": round(now - marks[0][1], 3)}


def launch_time() -> float:
    """When the launcher of this process was started, in seconds since 1970; where there is no launcher, when this process was."""
    if not Path("/proc/uptime").is_file():
        return 0.0
    launched = os.environ.get(LAUNCHED)
    return time.time() - (time.monotonic() - (float(launched) if launched else process_birth()))


def process_birth() -> float:
    """When this process began, to a hundredth of a second, on the clock that all processes of a machine share."""
    age = float(Path("/proc/uptime").read_text().split()[0]) - float(start_ticks(os.getpid()) or 0) / os.sysconf(
        "SC_CLK_TCK"
    )
    return time.monotonic() - age


class Pulse:
    """Says where this rank is, and how long it may be silent.

    Args:
        quiet_seconds: how long a phase without steps may take: loading, evaluation, saving, export.
        hang_factor: a step may take this multiple of the median of the last ones,
        hang_seconds: but always at least so long.
    """

    def __init__(self, rank: int, quiet_seconds: float, hang_factor: float, hang_seconds: float) -> None:
        self._quiet, self._factor, self._floor = quiet_seconds, hang_factor, hang_seconds
        self._rank, self._step, self._seen, self._phase = rank, 0, 0, ""
        self._steps: deque[float] = deque(maxlen=32)
        self._last: float | None = None
        self._stacks: IO[str] | None = None
        self._file = -1
        folder = os.environ.get(NODE_DIR)
        if folder is not None:
            self._stacks = (Path(folder) / f"rank-{rank}.stacks").open("a")
            faulthandler.register(DUMP_SIGNAL, self._stacks, all_threads=True)
            self._file = os.open(Path(folder) / f"rank-{rank}.pulse", os.O_WRONLY | os.O_CREAT, 0o644)
        self.startup_file: Path | None = None  # where the first step leaves how long each part of the start-up took
        self.phase("process group")

    def phase(self, name: str) -> None:
        """Begin something that has no steps; the next sign is due within `quiet_seconds`."""
        self._last = None
        if self._seen == 0:
            begin(name)
        self._write(name, self._quiet)

    def where(self) -> str:
        """The phase that runs."""
        return self._phase

    def beat(self) -> None:
        """Something of a phase without steps is done, a batch of an evaluation say: its time begins anew."""
        if self._phase != "train":
            self._write(self._phase, self._quiet)

    def step(self, step: int) -> None:
        """A step has ended; so has the phase before it."""
        now = time.monotonic()
        self._step = step
        if self._seen == 0 and self.startup_file is not None and Path("/proc/uptime").is_file():
            self.startup_file.write_text(json.dumps(startup(), indent=1) + "\n")
        if self._last is not None and self._seen >= FIRST_STEPS:
            self._steps.append(now - self._last)
        self._seen += 1
        self._last = now
        known = len(self._steps) > 0
        allowed = max(self._floor, self._factor * statistics.median(self._steps)) if known else self._quiet
        self._write("train", allowed)

    def _write(self, phase: str, allowed: float) -> None:
        self._phase = phase
        if self._file >= 0:
            sign = {"rank": self._rank, "pid": os.getpid(), "started": start_ticks(os.getpid()), "phase": phase,
                    "step": self._step, "allowed": round(allowed, 1), "due": time.monotonic() + allowed}  # fmt: skip
            os.pwrite(self._file, json.dumps(sign).ljust(SIZE).encode(), 0)


def note_error(rank: int, error: BaseException) -> None:
    """Leave word of what this rank failed with, for the launcher, which names the first."""
    folder = os.environ.get(NODE_DIR)
    if folder is not None:
        from tritune.trainer.redact import redact

        text = redact(f"{type(error).__name__}: {error}")
        note = {"rank": rank, "error": text, "type": type(error).__name__, "time": time.time()}
        whole = Path(folder) / f"rank-{rank}.error"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(note))
        part.replace(whole)  # the launcher looks five times a second


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies: no rank outlives a launcher, ours or a torchrun, that was killed
    (Linux). Without it such a rank trained on, and kept the other machines in their collectives."""
    if NODE_DIR in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies (Linux)."""
    if hasattr(os, "pidfd_open"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_ticks(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks: with its number it names one process for good. None: no such."""
    stat = proc_stat(pid)
    return stat[19] if stat else None


def proc_stat(pid: int) -> list[Any] | None:
    """`/proc/<pid>/stat` after the name: state, parent, ...; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
