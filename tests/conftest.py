"""Fixtures: the shared data (absent on most machines), small generated rows, runs in this process."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the forked processes too
for folder in ("kernels", "launch", "model", "trainer"):  # judge.py, and what tests of one folder share
    sys.path.insert(0, str(Path(__file__).resolve().parent / folder))

# Tokenized rows of the tests go where nobody's own are, and away with them.
_cache = tempfile.TemporaryDirectory(prefix="tritune-cache-")
os.environ["TRITUNE_CACHE"] = _cache.name

import harness  # noqa: E402  first of all: it sets the number of threads, which torch reads when it is imported
import today  # noqa: E402
import torch  # noqa: E402

today.seed()  # before xdist starts its workers, which inherit it

# A busy machine is no fault of a test's.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported, here and in forked ranks


def pytest_report_header() -> str:
    return f"large matrices: the part of day {today.seed()} ({today.VARIABLE}={today.seed()} repeats it, all tests everything)"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and tiny pretrained models beside the checkout; never copied into it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the shared data is absent: {path}")
    return path


@dataclass
class Result:
    code: int
    err: str

    def lines(self) -> list[str]:
        return self.err.strip().splitlines()


@pytest.fixture
def tritune(capfd):
    """Call the trainer in this process: `tritune("experiment=...", ...)` -> exit status and what it printed."""
    from tritune.trainer.__main__ import main

    def call(*overrides: str) -> Result:
        capfd.readouterr()
        code = main(list(overrides))
        out = capfd.readouterr()
        return Result(code, out.err)

    with harness.keeping_signals():
        yield call


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(step)`: the run in this process gets a SIGTERM in that step."""
    import signal

    from tritune.trainer.run.state import TrainState

    def arm(step: int) -> None:
        advance = TrainState.advance

        def and_ask(self, steps_per_epoch):
            advance(self, steps_per_epoch)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(TrainState, "advance", and_ask)

    return arm


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory) -> Path:
    """120 prompts and responses of very different lengths: masks are ragged."""
    path = tmp_path_factory.mktemp("rows") / "sft.jsonl"
    harness.write_prompts(path, 120, seed=7)
    return path


@pytest.fixture(scope="session")
def label_file(tmp_path_factory) -> Path:
    """450 short texts in three classes that one word gives away."""
    rng = random.Random(11)
    path = tmp_path_factory.mktemp("rows") / "labels.jsonl"
    lines = []
    for i in range(450):
        label = ["red", "green", "blue"][i % 3]
        filler = " ".join(rng.choices(["box", "hat", "car", "sky", "old", "new"], k=rng.randint(1, 8)))
        lines.append(json.dumps({"text": f"{filler} {label} {i}", "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny(sft_file) -> list[str]:
    """Overrides of a run that takes a second: a two-layer model with random weights on the generated rows."""
    return [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48",
        f"data.train={sft_file}", "data.max_length=160", "train.batch_size=8", "train.max_steps=4",
        "optim.lr=1e-4", "backend.device=cpu", "export.enabled=false", "report.enabled=false",
    ]  # fmt: skip
