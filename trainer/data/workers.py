"""Processes that parse and encode chunks: forked, fed as they become free, their results in the order of the chunks.

Written out, since `ProcessPoolExecutor` hangs for good when a process is killed while a chunk is on its way to it (CPython
gh-94777, in Python 3.11.7 and before); here a pipe a process, and one that ends is seen by its end. One that the limits of a
template's rendering end (`isolated.limited`) is followed by another, and its chunk is done here, which finds the row at fault.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from mmap import mmap
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import pyarrow as pa
from tritune.trainer.data import isolated
from tritune.trainer.run.pulse import die_with_parent

AHEAD = 3  # results a process that may wait for an earlier one: memory stays flat however large the source is


@dataclass
class _Worker:
    """mark: not 0 while limits may end it. item, number: what it works on."""

    work: Callable[[Any], Any]
    mark: mmap = field(default_factory=lambda: mmap(-1, 1))
    item: Any = None
    number: int = -1

    def __post_init__(self) -> None:
        # Forked, not spawned: a tokenizer is inherited, and importing transformers anew takes seconds a process.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work, self.mark), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is the pipe's end

    def begin(self, item: Any, number: int) -> None:
        self.item, self.number = item, number
        try:
            self.pipe.send(item)
        except ConnectionError:
            raise self._ended() from None

    def result(self) -> tuple[bool, Any]:
        """Whether it failed, and what it made or raised."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            if not self.mark[0]:
                raise self._ended() from None
        return False, self.work(self.item)

    def is_alive(self) -> bool:
        return not self.mark[0]

    def _ended(self) -> RuntimeError:
        self.process.join(5.0)
        status = self.process.exitcode or 0
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return RuntimeError(
            f"a process that tokenized ended abruptly, {how}. Where memory ran out, lower cache.num_procs"
        )

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def in_order(work: Callable[[Any], Any], items: Iterator[Any], num_procs: int) -> Iterator[Any]:
    """Yield `work(item)` for each item, in their order, computed by forked processes that inherit `work`.

    Raises:
        RuntimeError: a process ended before its work did.
        Exception: whatever `work` raised.
    """
    busy: dict[Connection, _Worker] = {}
    done: dict[int, Any] = {}
    free: list[_Worker] = []
    sent = given = 0
    try:
        for _ in range(num_procs):
            free.append(_Worker(work))
        more = True
        while more or busy:
            while more and free and sent - given < AHEAD * num_procs:
                try:
                    item = next(items)
                except StopIteration:
                    more = False
                    break
                worker = free.pop()
                busy[worker.pipe] = worker
                worker.begin(item, sent)
                sent += 1
            for pipe in cast(list[Connection], wait(list(busy)) if busy else []):
                worker = busy[pipe]
                failed, result = worker.result()
                if failed:
                    raise result
                done[worker.number] = result
                del busy[pipe]
                if not worker.is_alive():
                    worker.close()
                    worker = _Worker(work)
                free.append(worker)
            while given in done:
                yield done.pop(given)
                given += 1
    finally:
        for worker in [*free, *busy.values()]:
            worker.close()


def _serve(pipe: Connection, work: Callable[[Any], Any], mark: mmap) -> None:
    """A process: one thread, no signal of the terminal's or the group's, no life after its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent follows them
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    isolated.may_be_ended(mark)
    gc.freeze()  # what was there before is never looked at, nor its pages copied
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (False, work(item))
        except Exception as error:  # noqa: BLE001  raised again by the parent
            answer = (True, error)
        pipe.send(answer)
