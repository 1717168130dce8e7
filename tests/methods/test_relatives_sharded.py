"""DoRA and LoRA+ on sharded weights: the same model on every backend, a run that goes on elsewhere, and what it exports."""

from __future__ import annotations

import json
import re
import shutil

import harness
import planted
import pytest
from tritune.launch import processes
from tritune.launch.verify import verify

RELATIVES = ["method=lora", "method.dora=true", "method.rank=4", "method.dropout=0.1", "method.lora_plus_ratio=8",
             "method.rank_pattern.down_proj=2", "optim.lr=5e-3"]  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "nf4"])
def words(request, tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("relatives")
    harness.write_prompts(root / "rows.jsonl", 60, seed=3)
    return [
        f"model.path={harness.save_small_llama(root / 'model', 160)}", f"data.train={root / 'rows.jsonl'}",
        f"model.storage={request.param}", "data.max_length=160", "backend.device=cpu",
        "train.batch_size=12", "train.micro_batch_size=3", *RELATIVES,
    ]  # fmt: skip


@pytest.mark.slow
def test_every_sharding_trains_the_same_model(words, tmp_path):
    """Weights that no rank holds whole: the lengths of their rows are taken where a layer gathers them."""
    # By itself ZeRO-3 keeps parameters as small as these whole on each rank, and would prove nothing.
    proof = [
        "backend=zero3",
        "backend.persistence_elements=0",
        "kernels.loss_chunk_tokens=32",  # ranks call the head unequally often
        "verify.steps=8",
        "verify.parameters_every=4",
        "verify.backends=[fsdp,zero2,zero3]",
        "launch.num_procs=2",
    ]
    assert verify(["parity", *words, *proof, f"run.dir={tmp_path / 'proof'}"]) == 0
    found = json.loads((tmp_path / "proof" / "parity.json").read_text())
    assert found["holds"]
    assert found["reference"][-1]["loss"] < found["reference"][0]["loss"]


@pytest.mark.slow
def test_a_run_goes_on_on_another_backend_and_exports(words, tmp_path):
    """Three groups of parameters, two of them with a rate of their own: flat on ZeRO-2 and whole on one process of FSDP."""
    common = [*words, "train.max_steps=6", "checkpoint.every=3", "evaluation.base=false", "report.enabled=false"]
    source, other = tmp_path / "unbroken", tmp_path / "other"
    harness.run([*common, "backend=zero2", f"run.dir={source}"], tmp_path / "logs", 2)
    shutil.copytree(source, other, ignore=lambda *_: ["step-00000006", "export"])
    merged = ["backend=fsdp", "run.resume=require", "export.form=merged", f"run.dir={other}"]
    harness.run([*common, *merged], other / "logs")
    for a, b in zip(harness.rows(other), harness.rows(source), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    for run, form, reader in ((source, "adapter", "peft"), (other, "merged", "transformers")):
        exported = json.loads((run / "summary.json").read_text())["export"]
        assert (exported["form"], exported["reader"].split()[0].lower()) == (form, reader)
        assert exported["max_difference"] <= exported["allowed"]
    settings = json.loads((source / "export" / "adapter_config.json").read_text())
    assert settings["use_dora"]
    assert settings["rank_pattern"] == {"down_proj": 2}


@pytest.mark.slow
def test_no_frozen_parameter_stays_gathered_after_a_step(words, tmp_path, monkeypatch):
    """A known fault of some DeepSpeed versions under activation checkpointing: memory grows to the whole model on each rank."""
    monkeypatch.setattr(processes, "_rank", planted.rank_that_tells_what_stays_gathered)
    more = ["backend=zero3", "backend.persistence_elements=0", "train.activation_checkpointing=full", "train.max_steps=3",
            "export.enabled=false", "report.enabled=false", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    told = harness.run([*words, *more], tmp_path / "logs", 2).output()
    assert len(re.findall(r"of \d\d frozen parameters are whole: \[\]", told)) == 6, told
