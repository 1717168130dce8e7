"""Ranks that wait for one another without a collective: however long one tokenizes, no time limit ends the wait."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tritune.launch.processes import CONTEXT
from tritune.trainer.errors import UnreachableError
from tritune.trainer.parallel.distributed import World, _portable

LIMIT, LATE = 2.0, 5.0  # seconds: of a collective, and what one rank takes


def rank(number: int, store: str, out: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=number, world_size=2, timeout=timedelta(seconds=LIMIT)
    )
    world, beats = World(number, 2, torch.device("cpu")), []
    with world.raise_on_all("tokenizing", patiently=lambda: beats.append(1)):
        time.sleep(LATE if number else 0.0)
    Path(out).write_text(f"{len(beats)}")
    dist.destroy_process_group()
    os._exit(0)


def test_a_rank_that_takes_long_is_waited_for(tmp_path):
    arguments = [(i, str(tmp_path / "store"), str(tmp_path / str(i))) for i in range(2)]
    processes = [CONTEXT.Process(target=rank, args=a) for a in arguments]
    began = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert time.monotonic() - began >= LATE > LIMIT
    assert int((tmp_path / "0").read_text()) > 10, "and it showed signs of life meanwhile"


def test_a_fault_of_the_users_is_known_as_one_by_the_other_ranks():
    """Whatever kind of input error it is: they end with the same status, and no job is tried again for it."""
    assert _portable(UnreachableError("hf://a:b", "it is down", "Wait")) == "InputError: hf://a:b: it is down. Wait"
    assert _portable(ValueError("x")) == "ValueError: x"
