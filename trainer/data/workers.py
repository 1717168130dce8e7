"""Processes that parse and encode chunks: forked, fed as they become free, their results in the order of the chunks.

Written out, since `ProcessPoolExecutor` hangs for good when a process is killed while a chunk is on its way to it (CPython
gh-94777, in Python 3.11.7 and before); here a pipe a process, and one that ends is seen by its end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import pyarrow as pa
from tritune.trainer.pulse import die_with_parent

AHEAD = 3  # results a process that may wait for an earlier one: memory stays flat however large the source is


def in_order(work: Callable[[Any], Any], items: Iterator[Any], num_procs: int) -> Iterator[Any]:
    """Yield `work(item)` for each item, in their order, computed by forked processes that inherit `work`.

    Raises:
        RuntimeError: a process ended before its work did.
        Exception: whatever `work` raised.
    """
    # Forked, not spawned: a tokenizer is inherited, and importing transformers anew takes seconds a process.
    context = multiprocessing.get_context("fork")
    processes: dict[Any, Any] = {}
    busy: dict[Any, int] = {}
    done: dict[int, Any] = {}
    sent = given = 0
    try:
        for _ in range(num_procs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # so that its end is the pipe's end
            processes[ours] = process
        free, more = list(processes), True
        while more or busy:
            while more and free and sent - given < AHEAD * num_procs:
                try:
                    item = next(items)
                except StopIteration:
                    more = False
                    break
                pipe = free.pop()
                _talk(pipe.send, processes[pipe], item)
                busy[pipe], sent = sent, sent + 1
            for pipe in cast(list[Connection], wait(list(busy)) if busy else []):
                failed, result = _talk(pipe.recv, processes[pipe])
                if failed:
                    raise result
                done[busy.pop(pipe)] = result
                free.append(pipe)
            while given in done:
                yield done.pop(given)
                given += 1
    finally:
        for pipe, process in processes.items():
            process.kill()
            process.join()
            pipe.close()


def _talk(call: Callable[..., Any], process: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (EOFError, ConnectionError):
        process.join(5.0)
        how = f"by signal {-process.exitcode}" if (process.exitcode or 0) < 0 else f"with status {process.exitcode}"
        raise RuntimeError(
            f"a process that tokenized ended abruptly, {how}. Where memory ran out, lower cache.num_procs"
        ) from None


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """A process: one thread, no signal of the terminal's or the group's, no life after its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent follows them
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
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
