"""A run that was killed goes on bit for bit: same losses, no step missing or twice."""

from __future__ import annotations

import random
import signal

import harness
import pytest

STEPS = 40
METHODS = {"full": ["method=full"], "lora": ["method=lora", "method.rank=4", "method.dropout=0.1"]}


def overrides(sft_file, directory, method: str) -> list[str]:
    return [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={sft_file}",
        "data.max_length=160", "data.validation_share=0.2", "train.batch_size=8", "train.micro_batch_size=3",
        f"train.max_steps={STEPS}", "evaluation.every=10", "checkpoint.every=5", "backend.device=cpu",
        "export.enabled=false", "report.enabled=false", "optim.lr=2e-3", f"run.dir={directory}", *METHODS[method],
    ]  # fmt: skip


def curve(directory) -> list[tuple]:
    return [
        (r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"], r["label_tokens"]) for r in harness.rows(directory)
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, sft_file):
    """Curve and evaluations of a run that nobody stopped, by method and world size."""
    root, kept = tmp_path_factory.mktemp("unbroken"), {}

    def get(method: str, world_size: int):
        if (method, world_size) not in kept:
            directory = root / f"{method}-{world_size}"
            harness.run(overrides(sft_file, directory, method), root / "logs", world_size)
            kept[method, world_size] = curve(directory), harness.rows(directory, "evaluations.jsonl")
        return kept[method, world_size]

    return get


@pytest.mark.parametrize(
    ("method", "world_size", "kills"),
    [
        ("full", 1, 1),
        ("lora", 2, 1),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("lora", 1, 2), ("full", 2, 1))),
    ],
)
def test_killed_run_goes_on_bit_for_bit(tmp_path, sft_file, unbroken, method, world_size, kills):
    """SIGKILL at random steps, of all ranks at once, as when a node dies."""
    rng = random.Random(f"{method}{world_size}")
    directory, arguments = tmp_path / "run", overrides(sft_file, tmp_path / "run", method)
    for _ in range(kills):
        job = harness.start(arguments, tmp_path / "logs", world_size)
        harness.wait_for_step(job, directory, rng.randint(1, STEPS - 2))
        job.signal(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL] * world_size, job.output()
    harness.run(arguments, tmp_path / "logs", world_size)
    expected_curve, expected_evaluations = unbroken(method, world_size)
    assert curve(directory) == expected_curve
    assert harness.rows(directory, "evaluations.jsonl") == expected_evaluations
    assert [r[0] for r in expected_curve] == list(range(1, STEPS + 1))


OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHERS])
def test_signal_saves_and_stops(tmp_path, sft_file, unbroken, number):
    """One rank of two catches a signal: both save the same step and exit 75; the same command goes on."""
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored here, as under nohup, and then a run ignores it, too")
    directory, arguments = tmp_path / "run", overrides(sft_file, tmp_path / "run", "lora")
    job = harness.start(arguments, tmp_path / "logs", 2)
    harness.wait_for_step(job, directory, 7)
    job.signal(number, ranks=[1])
    assert job.wait() == [75, 75], job.output()
    stopped_at = harness.rows(directory)[-1]["step"]
    assert 7 <= stopped_at < STEPS
    assert (directory / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    import json

    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["culprit"]) == ("stopped", 75, number.name)
    harness.run(arguments, tmp_path / "logs", 2)
    assert curve(directory) == unbroken("lora", 2)[0]


def test_resume_on_another_world_size(tmp_path, sft_file, unbroken):
    """2 ranks, stopped, then 1: the same samples in the same order; losses to fp32 rounding."""
    directory, arguments = tmp_path / "run", overrides(sft_file, tmp_path / "run", "lora")
    job = harness.start(arguments, tmp_path / "logs", 2)
    harness.wait_for_step(job, directory, 12)
    job.signal(signal.SIGTERM, ranks=[0])
    assert job.wait() == [75, 75], job.output()
    harness.run(arguments, tmp_path / "logs", 1)
    expected = unbroken("lora", 1)[0]
    actual = curve(directory)
    assert [(r[0], *r[3:]) for r in actual] == [(r[0], *r[3:]) for r in expected]
    assert [r[1] for r in actual] == pytest.approx([r[1] for r in expected], rel=1e-5)


def test_finished_run_is_not_trained_again(tmp_path, sft_file):
    arguments = [*overrides(sft_file, tmp_path / "run", "lora"), "train.max_steps=5"]
    harness.run(arguments, tmp_path / "logs")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    harness.run(arguments, tmp_path / "logs")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_stop_on_an_evaluation_step_does_not_lose_it(tmp_path, sft_file):
    """A stop saves at once; the evaluation that was due is made up for when the run goes on."""
    extra = ["evaluation.every=1", "train.patience=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    harness.run([*overrides(sft_file, whole, "full"), *extra], tmp_path / "logs")
    arguments = [*overrides(sft_file, stopped, "full"), *extra]
    job = harness.start(arguments, tmp_path / "logs")
    harness.wait_for_step(job, stopped, 8)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75], job.output()
    harness.run(arguments, tmp_path / "logs")
    expected, actual = (harness.rows(directory, "evaluations.jsonl") for directory in (whole, stopped))
    assert [r["step"] for r in actual] == list(range(1, STEPS + 1))
    assert actual == expected
    assert curve(stopped) == curve(whole)
