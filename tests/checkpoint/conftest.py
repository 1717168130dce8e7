"""A run that nothing happened to, made once for all tests of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import harness
import pytest
from saved import STEPS


@pytest.fixture(scope="session")
def unbroken(sft_file, tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides without run.dir, and the directory of a run that nothing happened to; it is copied, never changed."""
    from tritune.trainer.__main__ import main

    overrides = [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={sft_file}",
        "data.max_length=160", "train.batch_size=8", "train.max_steps=6", "backend.device=cpu",
        "export.enabled=false",
        "report.enabled=false", "checkpoint.every=2", "checkpoint.keep_last=3", "data.validation_share=0.1",
        "evaluation.every=2",
    ]  # fmt: skip
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    with harness.keeping_signals():
        assert main([*overrides, f"run.dir={directory}"]) == 0
    names = {p.name for p in (directory / "checkpoints").iterdir()}
    assert {f"step-{s:08d}" for s in STEPS} <= names
    return overrides, directory


@pytest.fixture
def again(tritune, unbroken, tmp_path):
    """A copy of the run to be damaged, and a function that gives its command again."""
    overrides, directory = unbroken
    shutil.copytree(directory, tmp_path / "run", symlinks=True)
    return tmp_path / "run", lambda *more: tritune(*overrides, f"run.dir={tmp_path / 'run'}", *more)
