"""Items in a process that the system's limits end: the one at fault is known, the others are done, and no process stays."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from harness import children
from tritune.trainer.data import confined, isolated
from tritune.trainer.data.confined import Confined, Ended, EndedTooOftenError


def work(item: tuple) -> tuple:
    what, value = item
    if what == "spin":
        10 ** (10**8) % 7
    if what == "memory":
        return ([bytes(1 << 20) for _ in range(4096)],)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise KeyError(value)
    return os.getpid(), value


def double(values: list[int]) -> list[tuple]:
    return [("double", v) for v in values]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(isolated, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(isolated, "WALL_SECONDS", 20.0)


def test_answers_come_in_order_from_one_other_process():
    process = Confined(work)
    found = process(double([1, 2, 3])) + process(double([4]))
    assert [v for _, v in found] == [1, 2, 3, 4]
    assert len({pid for pid, _ in found} | {os.getpid()}) == 2
    assert process([]) == []


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("spin", "more than 0.3 s of the processor"),
        ("memory", "more than 512 MiB of memory"),
        ("crash", "signal 11 (SIGSEGV)"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_what_ends_it_is_said_of_its_item_and_the_others_are_done(what, why, capfd):
    items = [*double([0, 1]), (what, None), *double([3])]
    found = Confined(work)(items)
    assert isinstance(found[2], Ended)
    assert why in found[2].why
    assert [f[1] for i, f in enumerate(found) if i != 2] == [0, 1, 3]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("quick")
def test_a_second_end_is_the_last():
    process = Confined(work)
    assert isinstance(process([("crash", None)])[0], Ended)
    assert process(double([1]))[0][1] == 1
    with pytest.raises(EndedTooOftenError, match="SIGSEGV") as error:
        process([*double([1, 2]), ("crash", None)])
    assert error.value.index == 2


def test_one_that_waits_is_killed(monkeypatch):
    monkeypatch.setattr(isolated, "WALL_SECONDS", 0.1)
    monkeypatch.setattr(confined, "_LOOK_SECONDS", 0.1)
    began = time.monotonic()
    [found] = Confined(lambda _: time.sleep(60))([None])
    assert found == Ended("it did not end within 0.1 s")
    assert time.monotonic() - began < 20


def test_a_fault_of_the_work_itself_is_raised_here():
    with pytest.raises(RuntimeError, match="KeyError: 5"):
        Confined(work)([("raise", 5)])


def test_it_ends_when_it_is_idle_or_nobody_has_it_and_begins_again(monkeypatch):
    before = children()
    monkeypatch.setattr(confined, "IDLE_SECONDS", 0.1)
    process = Confined(work)
    first = process(double([1]))[0][0]
    time.sleep(1.0)
    second = process(double([1]))[0][0]
    assert first != second
    del process
    assert children() == before


def test_forks_and_threads_have_their_own():
    process = Confined(work)
    mine = process(double([1]))[0][0]
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(process(double([1]))[0][0]))
    thread.start()
    thread.join()
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.write(theirs, str(process(double([1]))[0][0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    forked = int(os.read(ours, 20))
    os.close(ours), os.close(theirs)
    assert len({mine, forked, *found}) == 3
    assert process(double([7]))[0] == (mine, 7), "the fork left it alone"


def test_files_of_the_parent_are_not_held_open(tmp_path):
    with (tmp_path / "lock").open("w"):
        [held] = Confined(lambda _: (sorted(map(int, os.listdir("/proc/self/fd"))),))([None])
    assert len(held[0]) <= 6  # standard ones, its pipe, the null device, the listing itself
