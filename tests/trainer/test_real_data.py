"""Real models on real data, with the figures that this project promises."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import harness
import pytest
import today
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def summary(directory) -> dict:
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.slow
def test_banking77(shared, tmp_path):
    """Full fine-tuning of tinystories-656k. The mean of seeds 0 to 2 is in benchmarks/results/banking77-full.json."""
    arguments = [
        "experiment=banking77",
        f"model.path={shared}/models/tinystories-656k",
        f"data.train={shared}/intent/banking77_train.csv",
        f"data.test={shared}/intent/banking77_test.csv",
        f"run.dir={tmp_path / 'run'}",
    ]
    harness.run(arguments, tmp_path / "logs", timeout=900)
    test = summary(tmp_path / "run")["eval"]["test"]
    assert test["tuned"]["accuracy"] >= 0.855
    assert test["tuned"]["macro_f1"] >= 0.855
    assert test["base"]["accuracy"] < 0.05


@pytest.mark.slow
def test_shakespeare(shared, tmp_path):
    """60 steps of 16 x 128 tokens; what it costs on the model's own domain is shown."""
    arguments = [
        "experiment=shakespeare",
        f"model.path={shared}/models/stories260K",
        f"data.train={shared}/text/tinyshakespeare.txt",
        f"data.retention={shared}/text/tinystories_sample.txt",
        f"run.dir={tmp_path / 'run'}",
    ]
    job = harness.run(arguments, tmp_path / "logs", timeout=600)
    found = summary(tmp_path / "run")["eval"]
    assert found["validation"]["base"]["loss"] > 4.5
    assert found["validation"]["tuned"]["loss"] <= 2.9
    assert found["retention"]["tuned"]["bits_per_byte"] > found["retention"]["base"]["bits_per_byte"]
    assert "bits_per_byte" in job.output()


@pytest.mark.parametrize(("name", "perplexity"), [("stories260K", 4.39), ("tinystories-656k", 17.30)])
def test_base_on_its_own_domain(tritune, shared, tmp_path, name, perplexity):
    """Paragraphs that begin "Once upon a time": the published perplexity, and bits per byte as transformers gives them."""
    path = shared / "models" / name
    text = (shared / "text" / "tinystories_sample.txt").read_text()
    stories = [p for p in text.split("\n\n") if p.startswith("Once upon a time")]
    (tmp_path / "stories.txt").write_text("\n\n".join(stories))
    arguments = ["objective=pretrain", f"model.path={path}", f"data.train={tmp_path}/stories.txt"]
    arguments += [f"data.retention={tmp_path}/stories.txt", "data.max_length=64", "train.max_steps=1"]
    result = tritune(
        *arguments, "backend.device=cpu", "export.enabled=false", "report.enabled=false", f"run.dir={tmp_path / 'run'}"
    )
    assert result.code == 0, result.err
    base = summary(tmp_path / "run")["eval"]["retention"]["base"]
    assert base["perplexity"] == pytest.approx(perplexity, rel=0.005)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    nll = num_bytes = 0.0
    for story in stories:
        ids = tokenizer(story, return_tensors="pt").input_ids
        assert ids.shape[1] <= 512
        with torch.no_grad():
            nll += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        num_bytes += len(story.encode())
        places = tokenizer(story, return_offsets_mapping=True)["offset_mapping"]
        for token, (start, stop) in zip(ids[0].tolist(), places, strict=True):
            num_bytes -= len(story[start:stop].encode()) if token == tokenizer.unk_token_id else 0  # nothing is spelled
    assert base["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), today.some([("float32", 1e-5), ("float64", 1e-12)], 2, "torchrun"))
def test_torchrun_parity_on_a_pretrained_model(shared, tmp_path, dtype, tolerance):
    """stories260K on real instructions, LoRA with dropout: 1 process against torchrun's 2, at two micro-batch sizes."""
    curves = {}
    for processes, micro_batch_size in ((1, 16), (2, 8), (2, 3)):
        directory = tmp_path / f"{processes}-{micro_batch_size}"
        arguments = [
            "method=lora", "method.dropout=0.1", "optim.lr=1e-3", f"model.path={shared}/models/stories260K",
            f"model.dtype={dtype}", f"data.train={shared}/instruct/instruct_2000_permissive.jsonl",
            "data.columns={prompt: instruction, response: output}", "data.max_length=256", "data.unsupervised=drop",
            "train.batch_size=16", f"train.micro_batch_size={micro_batch_size}", "train.max_steps=20",
            "backend.device=cpu", "export.enabled=false", "report.enabled=false", f"run.dir={directory}",
        ]  # fmt: skip
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        )
        command = [sys.executable, *launcher, "-m", "tritune.trainer", *arguments]
        subprocess.run(command, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        curves[processes, micro_batch_size] = harness.rows(directory)
    reference = curves.pop((1, 16))
    worst = dict.fromkeys(("loss", "grad_norm"), 0.0)
    for rows in curves.values():
        assert len(rows) == len(reference) == 20
        for a, b in zip(reference, rows, strict=True):
            for key in worst:
                worst[key] = max(worst[key], abs(b[key] / a[key] - 1))
    print(f"{dtype}: largest relative difference {worst}")
    assert max(worst.values()) <= tolerance
    assert not math.isclose(reference[0]["loss"], reference[-1]["loss"], rel_tol=0.01)
