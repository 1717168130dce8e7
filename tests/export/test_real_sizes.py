"""Vocabularies and depths of real models on tiny widths: nothing on the way grows faster than they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sizes
from today import some
from tritune.launch.cli import main as cli

VOCABULARY, LAYERS = 262_144, 128
ROOT = Path(__file__).resolve().parents[2]
# Phases that a stop ends; steps and saves are finished, and a report mostly is before it could be ended.
STOPPED = ["data", "model", "export rehearsal", "backend", "dry run", "base", "finish", "export"]
SECONDS = 60.0  # of a phase; what grew with the square of the vocabulary took hours


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sizes.save_llama(tmp_path_factory.mktemp("sizes") / "model", VOCABULARY, LAYERS)


@pytest.fixture
def within():
    @contextmanager
    def phase(name):
        began = time.process_time()
        yield
        took = time.process_time() - began
        assert took < SECONDS, f"{name} took {took:.0f} s"

    return phase


def test_train_export_merge_and_evaluate(tritune, model, sft_file, tmp_path, within):
    run = tmp_path / "run"
    common = ["data.max_length=64", "data.overlong=drop", "backend.device=cpu"]
    with within("audit"):
        assert cli(["audit", f"model.path={model}", f"data.train={sft_file}", *common, f"audit.out={tmp_path}"]) == 0
    with within("train and export"):
        result = tritune(f"model.path={model}", f"data.train={sft_file}", "method=lora", "method.rank=2", *common,
                         "train.batch_size=2", "train.max_steps=1", f"run.dir={run}", "report.enabled=false")  # fmt: skip
    assert result.code == 0, result.err
    settings = json.loads((run / "export/adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 7
    with within("merge"):
        assert cli(["export", f"run.dir={run}", "export.form=merged", f"export.dir={tmp_path / 'merged'}"]) == 0
    with within("generate"):
        asked = ["--prompt", "Where?", "generate.max_new_tokens=2", f"generate.out={tmp_path / 'said.jsonl'}"]
        assert cli(["generate", f"model.path={tmp_path / 'merged'}", "backend.device=cpu", *asked]) == 0


def test_classify_by_token(tritune, model, label_file, tmp_path, within):
    with within("classify by token"):
        result = tritune(f"model.path={model}", f"data.train={label_file}", "objective=classify_token", "method=lora",
                         "method.targets=[q_proj]", "data.max_length=64", "train.batch_size=2", "train.max_steps=1",
                         "backend.device=cpu", "export.enabled=false", f"run.dir={tmp_path}", "report.enabled=false")  # fmt: skip
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.skipif(
    not some(["today", "", "", ""], 4, "half a billion")[0], reason="it takes minutes: every fourth day"
)
def test_half_a_billion_parameters(tmp_path):
    """Random weights in the shape of Qwen2.5 0.5B, 151,936 tokens, from audit to answers; a SIGTERM in the day's phases."""
    phases = [p.replace(" ", "_") for p in some(STOPPED, 4)]
    script = [sys.executable, ROOT / "benchmarks/phases.py", "--half-billion", "--out", tmp_path]
    done = subprocess.run([*script, "--stops", ",".join(phases)], capture_output=True, text=True, timeout=1200,
                          env={**os.environ, "OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    record = json.loads((tmp_path / "phases-half-billion.json").read_text())
    slow = {r["phase"]: r["seconds"] for r in record["rows"] if r["seconds"] > SECONDS}
    assert set(slow) <= {"train", "  train"}  # the whole verb, and its steps
    assert [(s["phase"].replace(" ", "_"), s["exit"]) for s in record["stops"]] == [(p, 75) for p in phases]
    assert max(s["seconds"] for s in record["stops"]) < 10.0, record["stops"]
