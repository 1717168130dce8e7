"""A stop that is asked for where there are no steps is followed at once, and costs nothing but the piece it fell into."""

from __future__ import annotations

import json
import os
import signal
import time

import harness
import planted
import pytest
import torch
from test_resume import curve, overrides
from tritune.launch import processes
from tritune.trainer.data.cache import cache_root
from tritune.trainer.errors import StopRequested
from tritune.trainer.objectives.language_model import LanguageModel
from tritune.trainer.parallel.distributed import World
from tritune.trainer.run.stop import Stop


def asks(monkeypatch, at: int) -> None:
    """A SIGTERM to this process while it scores the `at`-th batch."""
    score, calls = LanguageModel.score, []

    def and_ask(self, model, batch):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, model, batch)

    monkeypatch.setattr(LanguageModel, "score", and_ask)


@pytest.fixture(scope="module")
def settings(sft_file):
    """Evaluations of the base, after steps 10 and 20, and of the tuned model."""

    def of(directory):
        short = [
            "train.max_steps=20",
            "evaluation.batch_size=8",
            "evaluation.splits=[validation]",
            "evaluation.samples=0",
        ]
        return [*overrides(sft_file, directory, "lora"), *short]

    return of


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    harness.run(settings(root / "run"), root / "logs")
    return root / "run"


def figures(run):
    return json.loads((run / "summary.json").read_text())["eval"]


@pytest.mark.parametrize(
    ("evaluation", "batch", "step", "says"),
    [pytest.param(0, 1, 0, "the start", id="base", marks=pytest.mark.slow),
     pytest.param(1, 0, 10, "after step 10, saved", id="validation"),
     pytest.param(1, -1, 10, "after step 10, saved", id="last batch of one", marks=pytest.mark.slow),
     pytest.param(3, 1, 20, "from step 20", id="tuned", marks=pytest.mark.slow)],
)  # fmt: skip
def test_within_an_evaluation(tritune, settings, unbroken, tmp_path, monkeypatch, evaluation, batch, step, says):
    batches = -(-json.loads((unbroken / "data.json").read_text())["validation"]["rows"] // 8)
    with monkeypatch.context() as patch:
        asks(patch, evaluation * batches + batch % batches + 1)
        stopped = tritune(*settings(tmp_path))
    assert stopped.code == 75, stopped.err
    assert says in stopped.lines()[-1]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["culprit"]) == ("stopped", step, "SIGTERM")
    assert not (tmp_path / "summary.json").exists()
    assert tritune(*settings(tmp_path)).code == 0
    assert curve(tmp_path) == curve(unbroken)
    assert harness.rows(tmp_path, "evaluations.jsonl") == harness.rows(unbroken, "evaluations.jsonl")
    assert figures(tmp_path) == figures(unbroken)


@pytest.mark.slow
def test_twice_in_the_same_validation(tritune, settings, unbroken, tmp_path, monkeypatch):
    """The second time it is whole, and written down, when the run ends: it is not written down again."""
    batches = -(-json.loads((unbroken / "data.json").read_text())["validation"]["rows"] // 8)
    for batch in (batches + 1, batches):
        with monkeypatch.context() as patch:
            asks(patch, batch)
            assert tritune(*settings(tmp_path)).code == 75
    assert [r["step"] for r in harness.rows(tmp_path, "evaluations.jsonl")] == [10]
    assert tritune(*settings(tmp_path)).code == 0
    assert harness.rows(tmp_path, "evaluations.jsonl") == harness.rows(unbroken, "evaluations.jsonl")


def test_a_file_that_was_seen_was_seen(tmp_path):
    """Though it goes again: other ranks may follow it already. A rank that does not lead sees it within its own work."""
    alone = World(0, 1, torch.device("cpu"))
    (tmp_path / "STOP").touch()
    leads, follows = Stop(), Stop()
    leads.watch(tmp_path, time.time() + 60)  # a start after it
    assert leads.agreed(alone) is None
    follows.watch(tmp_path, time.time() - 1, leads=False)
    follows.interrupt()
    (tmp_path / "STOP").touch()
    assert follows.agreed(alone) is None, "the first rank looks for all"
    with pytest.raises(StopRequested):
        follows.interrupt() or time.sleep(1.1) or follows.interrupt()
    assert follows.agreed(alone) == leads.agreed(alone) == "the file STOP"
    (tmp_path / "STOP").unlink()
    with pytest.raises(StopRequested, match="the file STOP"):
        leads.heed(alone)


@pytest.mark.slow
def test_one_rank_of_two_is_asked_within_an_evaluation(settings, tmp_path, monkeypatch):
    """They agree before each batch, or one would wait for the other in the next collective."""
    arguments = [*settings(tmp_path / "run"), "backend=fsdp", "evaluation.base=false"]
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_rank", planted.rank_asked_to_stop_in_an_evaluation)
        job = harness.start(arguments, tmp_path / "logs", 2)
        assert job.wait() == [75, 75], job.output()
    assert curve(tmp_path / "run")[-1][0] == 10
    assert harness.rows(tmp_path / "run", "evaluations.jsonl") == []
    harness.run(arguments, tmp_path / "logs", 2)
    assert [r["step"] for r in harness.rows(tmp_path / "run", "evaluations.jsonl")] == [10, 20]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.alone]), 2])
def test_while_rows_are_tokenized(tmp_path, world_size):
    rows, root = tmp_path / "rows.jsonl", cache_root(None)
    harness.write_prompts(rows, 60_000, seed=world_size)
    arguments = [*overrides(rows, tmp_path / "run", "lora"), "train.max_steps=2", "evaluation.base=false"]
    before = set(root.glob("*"))
    job = harness.start(arguments, tmp_path / "logs", world_size)
    while not {p for p in root.glob("*.part-*") if p not in before}:
        assert job.alive(), job.output()
        time.sleep(0.01)
    asked = time.monotonic()
    job.signal(signal.SIGUSR1)
    assert job.wait() == [75] * world_size, job.output()
    assert time.monotonic() - asked < 5.0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["culprit"]) == ("stopped", 0, "SIGUSR1")
    assert "stopped   by SIGUSR1; the same command goes on from the start" in job.output()
    left = {p.name.partition(".")[2].partition("-")[0] for p in set(root.glob("*")) - before if p.is_dir()}
    assert "part" not in left, "nothing half built is left"
