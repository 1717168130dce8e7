"""A stop ends a rank within ten seconds wherever its main thread is, and a compilation that never ends is ended."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import harness
import planted
import pytest
from tritune.launch import processes

# Where the main thread is held, as the module that calls it knows the function.
HELD = {
    "model": "tritune.trainer.build:load",
    "export rehearsal": "tritune.trainer.build:rehearse",
    "dry run": "tritune.trainer.build:dry_run",
    "base": "tritune.trainer.finish:_sample",
    "export": "tritune.trainer.finish:export",
    "report": "tritune.trainer.report:write_report",
}


@pytest.fixture
def held(tiny, tmp_path, monkeypatch):
    """Start a run that never comes back from one place; return it, its directory, and wait until it is there."""
    monkeypatch.setattr(processes, "_rank", planted.rank_that_never_comes_back)
    overrides = [o for o in tiny if not o.startswith(("export", "report"))]

    def start(name: str, place: str, *more: str, world_size: int = 1):
        run = tmp_path / name.replace(" ", "-")
        job = harness.start(
            [*overrides, f"run.dir={run}", "data.validation_share=0.2", *more], run / "logs", world_size,
            {"TRITUNE_PLANT": place},
        )  # fmt: skip
        return job, run

    return start


def wait_until_entered(job, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    mark = Path(job.logs[0]).with_suffix(".entered")
    while not mark.exists():
        assert job.alive(), job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.alone
def test_every_phase_ends_within_ten_seconds_of_a_stop(held, tiny, tritune):
    jobs = {name: held(name, place) for name, place in HELD.items()}
    for job, _ in jobs.values():
        wait_until_entered(job)
    began = time.monotonic()
    for job, _ in jobs.values():
        job.signal(signal.SIGTERM)
    for name, (job, run) in jobs.items():
        assert job.wait(60) == [75], job.output()
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["culprit"]) == ("stopped", 75, "SIGTERM"), name
        assert "stopped   by SIGTERM while in" in job.output()
    assert time.monotonic() - began < 10.0
    # Trained already: the same command exports what the checkpoint holds.
    run = jobs["export"][1]
    overrides = [o for o in tiny if not o.startswith(("export", "report"))]
    assert tritune(*overrides, f"run.dir={run}", "data.validation_share=0.2").code == 0
    assert json.loads((run / "summary.json").read_text())["export"]["max_difference"] < 1e-4
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_ranks_that_wait_for_a_held_one_end_with_it(held):
    """The signal reaches the waiting rank alone, which sits in a collective; the held one hears of it by the file."""
    job, run = held("two", HELD["export rehearsal"], "backend=ddp", world_size=2)
    wait_until_entered(job)
    began = time.monotonic()
    job.signal(signal.SIGTERM, [1])
    assert job.wait(60) == [75, 75], job.output()
    assert time.monotonic() - began < 20.0  # a stop is left to be followed twice, on a busy machine
    assert json.loads((run / "status.json").read_text())["culprit"] == "the file STOP"


def test_a_compilation_without_an_end_is_ended_with_a_message(held):
    job, run = held("compile", HELD["dry run"], "train.compile=true", "train.compile_seconds=1")
    assert job.wait(120) == [2]
    assert "torch.compile was not done with the first batch after 1 s" in job.output()
    assert "train.compile_seconds" in json.loads((run / "status.json").read_text())["culprit"]


def test_a_stop_after_the_end_is_written_down_changes_nothing_of_the_end(held):
    job, run = held("closing", "tritune.trainer.parallel.distributed:end", "train.max_steps=1")
    wait_until_entered(job)
    job.signal(signal.SIGTERM)
    assert job.wait(60) == [0], job.output()
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_a_signal_to_a_forked_child_is_not_the_parent_s(tritune, tiny, tmp_path, monkeypatch):
    """A pool that ends its children by SIGTERM must not end the run: they inherit its handler and its pipe."""
    from tritune.trainer import finish
    from tritune.trainer.run import guard

    monkeypatch.setattr(guard, "FOLLOW_SECONDS", 0.5)
    sample = finish._sample

    def and_end_a_child(*args):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        time.sleep(2.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return sample(*args)

    monkeypatch.setattr(finish, "_sample", and_end_a_child)
    assert tritune(*tiny, f"run.dir={tmp_path}", "evaluation.base=false").code == 0
