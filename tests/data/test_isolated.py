"""Work in a process that the system's own limits end: what is said of each end, and that nothing else of it is felt."""

from __future__ import annotations

import os
import signal
import time

import pytest
from harness import children
from tritune.trainer.data import isolated
from tritune.trainer.data.isolated import outcome_of


def spins():
    10 ** (10**8) % 7


def takes_memory():
    return [bytearray(1 << 20) for _ in range(4096)]


def takes_memory_and_says_otherwise():
    try:
        takes_memory()
    except MemoryError:
        raise ValueError("something else") from None


def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


def crashes_when_freed():
    class Loud:
        def __del__(self):
            crashes()

    one = Loud()
    one.me = one  # type: ignore[attr-defined]


def fails():
    raise KeyError("x")


ENDS = [
    (spins, "more than 1 s of the processor"),
    (takes_memory, "more than 512 MiB of memory"),
    (takes_memory_and_says_otherwise, "more than 512 MiB of memory"),
    (crashes, r"by signal 11 \(SIGSEGV\)"),
    (crashes_when_freed, "by signal 11"),
    (lambda: os._exit(3), "it ends its process"),
]


@pytest.mark.parametrize(("work", "why"), ENDS, ids=lambda value: getattr(value, "__name__", None))
def test_what_ends_it_is_said(monkeypatch, capfd, work, why):
    # On a busy machine half a gigabyte can take more than a second.
    monkeypatch.setattr(isolated, "CPU_SECONDS", 1 if work is spins else 60)
    said = outcome_of(work)
    assert said is not None
    assert why.replace("\\", "") in said
    assert capfd.readouterr() == ("", ""), "a crash that is expected writes no stack"


@pytest.mark.parametrize("work", [fails, lambda: None, lambda: bytearray(400 << 20)])
def test_what_comes_to_its_end(work):
    assert outcome_of(work) is None


def test_one_that_waits_is_killed(monkeypatch):
    monkeypatch.setattr(isolated, "WALL_SECONDS", 0.2)
    began = time.monotonic()
    assert outcome_of(lambda: time.sleep(60)) == "it did not end within 0.2 s"
    assert time.monotonic() - began < 30


def test_nothing_is_left():
    before = set(os.listdir("/proc/self/fd")), children()
    for work in (fails, crashes):
        outcome_of(work)
    assert (set(os.listdir("/proc/self/fd")), children()) == before
