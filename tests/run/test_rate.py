"""The learning rate that nobody gave, and the word about one that is far too low."""

from __future__ import annotations

import random
import re

import harness
import pytest
import yaml
from tritune.trainer.config.compose import load_config
from tritune.trainer.metrics.standstill import Standstill
from tritune.trainer.run.rate import default_rate

GIVEN = ["model=tiny", "data.train=x.jsonl", "train.max_steps=1"]


@pytest.mark.parametrize(("width", "full", "lora"), [
    (128, (1e-3, 4e-3), (2e-3, 8e-3)), (1024, (2e-5, 2e-4), (2e-4, 1e-3)), (2048, (2e-5, 1e-4), (2e-4, 1e-3)),
    (4096, (1e-5, 5e-5), (1e-4, 5e-4)), (8192, (5e-6, 2e-5), (1e-4, 3e-4)),
])  # fmt: skip
def test_the_default_lies_within_what_is_usual_at_each_width(width, full, lora):
    """Full: of BANKING77 at 128, of published recipes elsewhere (1e-5 to 5e-5 for 7B to 70B); LoRA: 1e-4 to 5e-4 for those."""
    for method, (low, high) in (("full", full), ("lora", lora)):
        config = load_config([*GIVEN, "objective=sft", f"method={method}"], None, 1)
        assert low <= default_rate(config.method, width) <= high, method


def test_a_run_without_a_rate_says_which_it_takes_and_keeps_it(tritune, tiny, tmp_path, stop_at):
    run = tmp_path / "run"
    stop_at(2)
    tiny = [*tiny, "optim.lr=null"]
    first = tritune(*tiny, "objective=sft", "method=lora", f"run.dir={run}")
    assert first.code == 75
    kept = yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"]
    assert f"optim     learning rate {kept:g}, for lora at this width" in first.err
    assert kept == default_rate(load_config([*GIVEN, "objective=sft", "method=lora"], None, 1).method, 32)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"lr: {kept}", f"lr: {kept / 2}"))  # as another version's default was
    refused = tritune(*tiny, "objective=sft", "method=lora", f"run.dir={run}")
    assert refused.code == 2  # the checkpoint knows better than a file that somebody changed
    assert f"optim.lr: {kept} -> {kept / 2}" in refused.err
    (run / "config.yaml").write_text(text)
    again = tritune(*tiny, "objective=sft", "method=lora", f"run.dir={run}")
    assert again.code == 0
    assert f"learning rate {kept:g}, as before" in again.err
    assert max(row["lr"] for row in harness.rows(run)) == pytest.approx(kept, rel=0.2)
    other = tritune(*tiny, "objective=sft", "method=lora", f"run.dir={run}", "optim.lr=1e-4")
    assert other.code == 2
    assert f"optim.lr: {kept} -> 0.0001" in other.err


def test_a_rate_that_is_far_too_low_is_named_and_the_remedy_helps(tritune, tiny, tmp_path):
    options = [*tiny, "objective=sft", "train.max_steps=60", "train.batch_size=4"]
    slow = tritune(*options, "optim.lr=1e-5", f"run.dir={tmp_path / 'slow'}")
    assert slow.code == 0
    (said,) = re.findall(r"step 22: the loss hardly moves, .* Raise optim.lr, 1e-05 .* optim.lr=(\S+) would", slow.err)
    assert float(said) == pytest.approx(1e-4)
    moved = tritune(*options, "optim.lr=1e-2", f"run.dir={tmp_path / 'moved'}")
    assert "hardly moves" not in moved.err


@pytest.mark.parametrize("fall", [0.0, 0.3, -0.5])
def test_noise_is_told_from_a_fall(fall):
    """Of 200 runs with a spread of 0.1 about 3: a fall by a tenth is never named, nor is a rise; one that stands mostly is."""
    named = 0
    for seed in range(200):
        rng = random.Random(seed)
        watch = Standstill(0, 1000, 30)
        found = [watch.add(3.0 - fall * step / 80 + rng.gauss(0, 0.1)) for step in range(100)]
        assert sum(one is not None for one in found) <= 1
        assert all(one is None for i, one in enumerate(found) if i != 79)
        named += found[79] is not None
    assert named == 0 if fall else named > 120


def test_a_run_that_goes_on_or_is_short_is_not_looked_at():
    for watch in (Standstill(5, 1000, 0), Standstill(0, 39, 0)):
        assert all(watch.add(1.0) is None for _ in range(100))
