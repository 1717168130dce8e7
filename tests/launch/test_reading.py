"""`tritune evaluate | generate launch.num_procs=2`: the ranks' figures and answers are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import today
from tritune.launch import cli
from tritune.launch.reading import processes_of

pytestmark = pytest.mark.slow


def verb(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tritune.launch.cli", *words, "backend.device=cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An adapter trained by one process, on a model in safetensors, so that ranks read their parts of it."""
    from tritune.trainer.__main__ import main

    root = tmp_path_factory.mktemp("read")
    for name, count, seed in (("train", 60, 3), ("test", 41, 4)):
        harness.write_prompts(root / f"{name}.jsonl", count, seed)
    words = [f"model.path={harness.save_small_llama(root / 'model', 160)}", f"data.train={root / 'train.jsonl'}", "method=lora",
             "data.max_length=160", "train.max_steps=6", "optim.lr=1e-2", "backend.device=cpu", "evaluation.samples=0",
             "export.enabled=false", "report.enabled=false", f"run.dir={root / 'run'}"]  # fmt: skip
    with harness.keeping_signals():
        assert main(words) == 0
    return root / "run"


def scored(run: Path, capfd, *words: str) -> tuple[dict, list[dict]]:
    test = [
        f"run.dir={run}",
        f"data.test={run.parent / 'test.jsonl'}",
        "evaluation.splits=[test]",
        "evaluation.batch_size=8",
    ]
    if words:
        done = verb("evaluate", *test, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("41 rows") == 1, "rank 0 speaks for all"
    else:
        assert cli.main(["evaluate", *test, "backend.device=cpu"]) == 0
    return json.loads((run / "evaluation.json").read_text())["eval"]["test"], harness.rows(run, "predictions.jsonl")


def test_two_ranks_give_the_figures_of_one(run, capfd):
    figures, rows = scored(run, capfd)
    for backend in ("auto", *today.some(["fsdp", "zero3"], 2, "reading")):
        found, lines = scored(run, capfd, "launch.num_procs=2", f"backend={backend}")
        assert found == pytest.approx(figures, rel=1e-6)  # sums in another order: 41 losses in float32
        assert [line["place"] for line in lines] == [row["place"] for row in rows]
        assert [line["loss"] for line in lines] == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def test_two_ranks_give_the_answers_of_one(run, tmp_path):
    words = ["generate", f"run.dir={run}", f"generate.file={run.parent / 'test.jsonl'}", "generate.max_new_tokens=12",
             "generate.batch_size=4", "generate.temperature=0.8"]  # fmt: skip
    assert cli.main([*words, "backend.device=cpu", f"generate.out={tmp_path / 'one.jsonl'}"]) == 0
    done = verb(*words, f"generate.out={tmp_path / 'two.jsonl'}", "launch.num_procs=2", "backend=fsdp")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_wrong_input_is_said_once(run, capfd):
    done = verb("evaluate", f"run.dir={run}", f"data.test={run}/absent.jsonl", "launch.num_procs=2")
    assert done.returncode == 2
    assert done.stderr.count("absent.jsonl") == 1
    assert "Traceback" not in done.stderr
    assert cli.main(["report", f"run.dir={run}", "launch.num_procs=2"]) == 2
    assert "launch.num_procs=2: report runs in one process" in capfd.readouterr().err


def test_a_rank_starts_no_others(monkeypatch):
    assert processes_of(["launch.num_procs=3", "launch.num_procs=2"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert processes_of(["launch.num_procs=2"]) == 1
