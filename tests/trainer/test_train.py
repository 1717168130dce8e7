"""Whole runs, small: each objective learns, the summary says what a reader needs, bad steps are refused."""

from __future__ import annotations

import itertools
import json
import math

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from tritune.trainer.objectives.language_model import LanguageModel
from tritune.trainer.objectives.loss import Loss


def summary(directory) -> dict:
    return json.loads((directory / "summary.json").read_text())


def tensors(directory, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in (directory / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        found |= load_file(shard)
    return found


def test_supervised_fine_tuning_writes_what_others_read(tritune, tiny, tmp_path):
    result = tritune(*tiny, "data.test_share=0.2", "train.max_steps=12", "optim.lr=3e-3", f"run.dir={tmp_path}")
    assert result.code == 0, result.err
    found = summary(tmp_path)
    assert found["status"] == "done"
    assert found["step"] == 12
    assert found["eval"]["test"]["tuned"]["loss"] < found["eval"]["test"]["base"]["loss"] - 0.5
    rows = harness.rows(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 13))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "label_tokens", "tokens_per_second"}
    assert all(keys <= set(r) for r in rows)
    assert rows[-1]["tokens"] == found["tokens"]
    assert found["label_tokens"] < found["tokens"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    for name in ("config.yaml", "environment.json", "data.json", "train.log"):
        assert (tmp_path / name).stat().st_size > 0
    assert "base against tuned" in result.err


@pytest.mark.parametrize("objective", ["classify", "classify_token"])
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_classification_learns(tritune, tiny, label_file, tmp_path, objective, method):
    data = [f"data.train={label_file}", "data.test_share=0.2", "data.max_length=96", "train.batch_size=32"]
    data += ["train.max_steps=150", "optim.lr=6e-3"]
    result = tritune(*tiny, *data, f"objective={objective}", f"method={method}", f"run.dir={tmp_path}")
    assert result.code == 0, result.err
    test = summary(tmp_path)["eval"]["test"]
    assert test["tuned"]["accuracy"] > 0.8 > test["base"]["accuracy"] + 0.2
    assert {"loss", "accuracy", "macro_precision", "macro_recall", "macro_f1"} <= set(test["base"])


def test_pretraining_shows_forgetting(tritune, tiny, tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("\n\n".join(f"the cat number {i} sat on the mat and saw {i * 7} birds" for i in range(150)))
    other.write_text("\n\n".join(f"ZEBRAS RUN {i} MILES" for i in range(20)))
    arguments = [f"data.train={text}", "data.validation_share=0.1", f"data.retention={other}", "data.max_length=64"]
    result = tritune(
        *tiny, "objective=pretrain", *arguments, "train.max_steps=20", "optim.lr=5e-3", f"run.dir={tmp_path / 'r'}"
    )
    assert result.code == 0, result.err
    assert "data.train: the end of each file is held out (data.held_out=auto)" in result.err
    found = summary(tmp_path / "r")["eval"]
    for split in ("validation", "retention"):
        base, tuned = found[split]["base"], found[split]["tuned"]
        assert base["perplexity"] == pytest.approx(math.exp(base["loss"]))
        # the byte tokenizer predicts each byte but a block's first: bits per byte is the loss in bits, nearly
        assert tuned["bits_per_byte"] == pytest.approx(tuned["loss"] / math.log(2), rel=0.05)
    assert found["validation"]["tuned"]["loss"] < found["validation"]["base"]["loss"] - 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_logged_rate_follows_the_schedule(tritune, tiny, tmp_path, schedule):
    arguments = [f"optim.schedule={schedule}", "optim.lr=1e-3", "optim.warmup_steps=2", "train.max_steps=10"]
    assert tritune(*tiny, *arguments, "optim.decay_ratio=0.5", f"run.dir={tmp_path}").code == 0
    rates = [r["lr"] for r in harness.rows(tmp_path)]
    assert 0 < rates[0] < rates[1] < rates[2] == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    assert (rates[-1] < 1e-3) == (schedule != "constant")


def test_early_stop_and_best_checkpoint(tritune, tiny, tmp_path):
    """A rate that wrecks the model: the best step is an early one, it is kept, tested and exported."""
    arguments = ["data.validation_share=0.2", "data.test_share=0.2", "evaluation.every=2", "train.patience=3"]
    arguments += ["train.use_best=true", "optim.lr=0.5", "optim.warmup_steps=6", "optim.schedule=constant"]
    result = tritune(*tiny, *arguments, "train.max_steps=60", f"run.dir={tmp_path}")
    assert result.code == 0, result.err
    found = summary(tmp_path)
    assert found["stopped_early"]
    assert found["step"] < 60
    best = found["best"]["step"]
    assert found["tested_step"] == best < found["step"]
    losses = {r["step"]: r["loss"] for r in harness.rows(tmp_path, "evaluations.jsonl")}
    assert losses[best] == min(losses.values()) == found["best"]["value"]
    assert found["eval"]["validation"]["tuned"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert f"step-{best:08d}" in kept
    assert len(kept) == 3  # the last two and the best


def test_step_with_infinite_loss_is_not_applied(tritune, tiny, tmp_path, monkeypatch):
    """Step 3 is poisoned: parameters and moments stay as they were, the run goes on, the rows are named."""
    whole = LanguageModel.__call__

    def poisoned(self, model, batch):
        loss = whole(self, model, batch)
        return Loss({"nll": loss.terms["nll"] * float("inf")}) if batch.step == 3 else loss

    monkeypatch.setattr(LanguageModel, "__call__", poisoned)
    result = tritune(*tiny, "checkpoint.every=1", "checkpoint.keep_last=9", "train.max_steps=5", f"run.dir={tmp_path}")
    assert result.code == 0, result.err
    assert "step 3" in result.err
    assert "not applied" in result.err
    assert "sft.jsonl:" in result.err
    assert summary(tmp_path)["skipped_steps"] == 1
    before, after, later = (tensors(tmp_path, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert [r["loss"] is None for r in harness.rows(tmp_path)] == [False, False, True, False, False]


def test_too_many_bad_steps_fail_the_run(tritune, tiny, tmp_path):
    """A rate of 1e18 leaves nothing finite after the first step."""
    arguments = ["optim.lr=1e18", "optim.warmup_steps=0", "train.max_nonfinite=3", "train.max_steps=30"]
    result = tritune(*tiny, *arguments, f"run.dir={tmp_path}")
    assert result.code == 1
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "Lower optim.lr" in status["culprit"]
    assert "Traceback" not in result.err
    assert status["step"] == len(harness.rows(tmp_path)) + 1 or status["step"] <= 6
    assert not (tmp_path / "summary.json").exists()


def test_unsupervised_rows_are_dropped_and_named(tritune, tiny, sft_file, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(sft_file.read_text() + json.dumps({"prompt": "x" * 400, "response": "never seen"}) + "\n")
    result = tritune(*tiny, f"data.train={data}", "data.unsupervised=refuse", f"run.dir={tmp_path / 'a'}")
    assert result.code == 2
    assert "rows.jsonl:121" in result.err
    result = tritune(*tiny, f"data.train={data}", f"run.dir={tmp_path / 'b'}")  # one of 121 is few
    assert result.code == 0, result.err
    assert "1 rows dropped" in result.err
    assert json.loads((tmp_path / "b" / "data.json").read_text())["train"]["dropped_places"] == [
        f"{data}:121 (its answer lies beyond the cut)"
    ]


def test_instructions_through_a_real_template(tritune, tiny, shared, tmp_path):
    """instruction, input, output by column mapping; a 32,011-token tokenizer whose template has no generation marks."""
    arguments = [
        f"data.train={shared}/instruct/instruct_2000_permissive.jsonl",
        f"model.tokenizer={shared}/tokenizers/phi-3-mini",
        "data.columns={prompt: instruction, response: output}",
        "data.max_length=512",
        "data.unsupervised=drop",
        "train.max_steps=3",
    ]
    result = tritune(*tiny, *arguments, f"run.dir={tmp_path}")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "data.json").read_text())["train"]
    assert report["rows"] + report["dropped"] == 2000
    assert report["stop_rows"] > 0.9 * report["rows"]
    assert 0.1 < report["supervised_tokens"] / report["tokens"] < 0.9


def test_misspelt_and_absent_columns_are_refused(tritune, tiny, tmp_path):
    result = tritune(*tiny, "data.columns.respnse=response", f"run.dir={tmp_path / 'a'}")
    assert result.code == 2
    assert "data.columns.respnse" in result.err
    assert "response" in result.err
    result = tritune(*tiny, "data.columns.input=context", f"run.dir={tmp_path / 'b'}")
    assert result.code == 2
    assert "context" in result.err
    assert "prompt, response" in result.err


@pytest.mark.parametrize("backend", ["single", "fsdp"])  # one that loads it whole, one that reads ranges of its files
def test_a_base_that_computes_no_numbers_is_refused_before_the_first_step(tritune, tiny, tmp_path, backend):
    """A weight that is none is named; where all are, and too large, that is said."""
    others = [o for o in tiny if not o.startswith("model")]
    for value, said in (
        (float("nan"), "tensors holds NaN or Inf: model.norm.weight"),
        (3e38, "all its weights are finite"),
    ):
        folder = harness.save_small_llama(tmp_path / f"model-{value}", 160)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"].fill_(value)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        result = tritune(*others, f"model.path={folder}", f"backend={backend}", f"run.dir={tmp_path / f'run-{value}'}")
        assert result.code == 2, result.err
        assert result.lines()[-1].startswith(f"tritune: model.path={folder}: ")
        assert said in result.lines()[-1]
        assert "Traceback" not in result.err
        assert not (tmp_path / f"run-{value}" / "metrics.jsonl").exists()


def test_ddp_on_one_process(tritune, tiny, tmp_path):
    assert tritune(*tiny, "backend=ddp", f"run.dir={tmp_path / 'ddp'}").code == 0
    assert tritune(*tiny, "backend=single", f"run.dir={tmp_path / 'single'}").code == 0
    ddp, single = (harness.rows(tmp_path / name) for name in ("ddp", "single"))
    assert [(r["loss"], r["grad_norm"]) for r in ddp] == [(r["loss"], r["grad_norm"]) for r in single]


def test_bfloat16_lora_on_a_family_that_is_compared_at_load(tritune, tiny, tmp_path):
    arguments = ["model.config.model_type=gemma", "model.config.head_dim=8", "model.dtype=bfloat16", "method=lora"]
    result = tritune(*tiny, *arguments, f"run.dir={tmp_path}")
    assert result.code == 0, result.err
