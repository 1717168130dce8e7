"""Work that may never end, take all memory or crash, tried in a forked process that the system's own limits end.

Nothing comes back but what ended it: what the work makes is lost with the process. `confined.py` has one whose answers are used.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

from tritune.trainer.run.pulse import die_with_parent

CPU_SECONDS = 2  # of processor time: a busy machine does not use it up
MEMORY_BYTES = 512 << 20  # of address space, above what this process has
WALL_SECONDS = 30.0  # the last resort, against a process that waits
_STATM = Path("/proc/self/statm")
_MEMORY, _DONE = b"m", b"d"

_watched = False
_rewound = 0.0
_mark: mmap | None = None


def outcome_of(work: Callable[[], object]) -> str | None:
    """Run `work` in a forked process of one thread; return what ended it, None where it came to its end.

    An exception of `work` is an end like others, but for one that says that memory ran out.
    """
    ours, theirs = os.pipe()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            confine()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            os.write(theirs, _attempt(work))
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        deadline = time.monotonic() + WALL_SECONDS
        ready = select.poll()  # not `select`, which takes no descriptor above 1023
        ready.register(ours, select.POLLIN)
        said = os.read(ours, 1) if ready.poll(1000 * max(deadline - time.monotonic(), 0)) else None
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(ours)
    if said is None:
        return f"it did not end within {WALL_SECONDS:g} s"
    return None if said == _DONE else why_ended(status, said == _MEMORY)


def _attempt(work: Callable[[], object]) -> bytes:
    try:
        work()
        gc.collect()  # what is nested deep can crash when it is freed
    except Exception as error:  # noqa: BLE001  it ended, which is what is asked here
        return _MEMORY if ran_out(error) else _DONE
    return _DONE


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out, also where another exception was made of that."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__context__
    return error is not None


def confine() -> None:
    """Make this a process that dies of its limits and with its parent, in silence. The clock is the caller's to set."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent follows them
        signal.signal(number, signal.SIG_IGN)
    # No stacks of what is expected.
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    gc.freeze()  # what was there before is never looked at: a collection takes milliseconds, not a second
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()


def _limit_memory() -> None:
    if not _STATM.is_file():  # not Linux: time alone is limited
        return
    pages = int(_STATM.read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY_BYTES
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def watch() -> None:
    """From here on this process, a confined one, ends when it takes `CPU_SECONDS` between two calls of `rewind`."""
    global _watched, _rewound
    _watched, _rewound = True, 0.0
    rewind()


def watched() -> bool:
    """Whether what this process does now is ended by limits."""
    return _watched


def may_be_ended(mark: mmap) -> None:
    """This process is one that its parent can do without. `mark` is shared with it, and not 0 while `limited` holds."""
    global _mark
    _mark = mark


def can_be_limited() -> bool:
    """Whether this is such a process."""
    return _mark is not None


@contextmanager
def limited() -> Iterator[None]:
    """Let limits end this process, without a word, while the block runs: what it does costs no way to another process and
    back. The parent sees the mark, and does the same work again where it finds out what was at fault."""
    global _watched
    assert _mark is not None
    kept = resource.getrlimit(resource.RLIMIT_AS)
    _mark[0] = 1
    _limit_memory()
    watch()
    try:
        yield
    except Exception as error:
        if ran_out(error):
            os._exit(1)
        raise
    finally:
        _watched = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, kept)
        _mark[0] = 0


def rewind() -> None:
    """Begin the clock anew, to a tenth of a second; nothing happens where none runs. Its signal ends C code, too."""
    global _rewound
    if _watched and (now := time.monotonic()) > _rewound + 0.1:  # setting it anew each time cost a short row 4 %
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        _rewound = now


def why_ended(status: int, memory: bool) -> str:
    """What ended a process.

    Args:
        status: as the system gives it to who waits. memory: it said itself that memory ran out.
    """
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if memory:
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    if number in (signal.SIGXCPU, signal.SIGPROF):
        return f"it takes more than {CPU_SECONDS} s of the processor"
    return (
        f"it ends its process by signal {number} ({signal.Signals(number).name})" if number else "it ends its process"
    )
