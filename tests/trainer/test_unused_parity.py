"""Text-only training of a model that sees images: one curve on every backend, and the tower the same bits after it.

Without the rule DDP does not come to its first step, for it waits for gradients, and ZeRO decays the matrices of the tower.
"""

from __future__ import annotations

import json
import re

import harness
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.trainer import verbs
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.verbs import run_verb

STEPS = 4
METHODS = {
    "full": ["method=full", "optim.lr=2e-3"],
    "lora": ["method=lora", "method.rank=4", "method.dropout=0.1", "optim.lr=5e-3", "export.form=merged"],
}
TOWER = ("model.vision_tower.", "model.multi_modal_projector.")
IN_FILES = ("vision_tower.", "multi_modal_projector.")  # Gemma 3's files have other prefixes


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    root = tmp_path_factory.mktemp("unused")
    harness.write_prompts(root / "rows.jsonl", 60, seed=3)
    harness.save_small_vlm(root / "gemma3")
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model("gpt2", n_embd=24, n_layer=2, n_head=4, n_positions=160, vocab_size=len(tokenizer),
                                  initializer_range=0.1, add_cross_attention=True)  # fmt: skip
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    settings = [
        f"data.train={root / 'rows.jsonl'}", "data.max_length=160", "train.batch_size=8", "train.micro_batch_size=2",
        f"train.max_steps={STEPS}", "optim.weight_decay=0.1", "backend.device=cpu", "report.enabled=false",
    ]  # fmt: skip
    return root, settings


@pytest.fixture(scope="module")
def runs(common):
    """Every cell's directory. DeepSpeed takes a process group for good, so that its cells have processes of their own."""
    root, settings = common
    cells = {}
    for backend in ("single", "ddp", "fsdp", "zero2", "zero3"):
        for method, overrides in METHODS.items():
            cells[f"{backend}-{method}"] = [f"model.path={root / 'gemma3'}", f"backend={backend}", *overrides]
    for backend in ("single", "ddp"):
        cells[f"{backend}-heads"] = [f"model.path={root / 'gpt2'}", f"backend={backend}", *METHODS["full"]]
    cells = {name: [*settings, *cell, f"run.dir={root / name}"] for name, cell in cells.items()}
    alone = [n for n in cells if n.startswith("single")]
    apart = [n for n in cells if n.startswith("zero")]
    harness.run_many([cells[n] for n in alone], root / "logs-1")
    harness.run_many([cells[n] for n in cells if n not in alone + apart], root / "logs-2", world_size=2)
    for name in apart:
        harness.run(cells[name], root / f"logs-{name}", world_size=2)
    return {name: root / name for name in cells}


CELLS = [f"{b}-{m}" for b in ("ddp", "fsdp", "zero2", "zero3") for m in METHODS] + ["ddp-heads"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_the_curve_of_one_process(runs, cell):
    expected, found = (harness.rows(runs[n]) for n in (f"single-{cell.partition('-')[2]}", cell))
    assert len(expected) == len(found) == STEPS
    assert expected[-1]["loss"] < 0.98 * expected[0]["loss"]  # it learns, so the curve says something
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["single-full", "single-lora", "single-heads", *CELLS])
def test_what_takes_no_part_keeps_its_bits(runs, common, cell):
    heads = cell.endswith("heads")
    base = load_file(common[0] / ("gpt2" if heads else "gemma3") / "model.safetensors")
    found = load_file(runs[cell] / "export" / "model.safetensors")
    assert set(found) == set(base)
    idle = {n for n in base if ("cross" in n if heads else n.startswith(IN_FILES))}
    assert len(idle) > 10
    assert {n for n in idle if not found[n].equal(base[n])} == set()
    changed = {n for n in base if not found[n].equal(base[n])}
    assert changed
    if not heads:  # whoever reads the export can show it images
        assert (runs[cell] / "export" / "preprocessor_config.json").read_text() == '{"size": 16}'
    if not cell.endswith("lora"):
        assert changed == set(base) - idle
    (checkpoint,) = (runs[cell] / "checkpoints").glob("step-*")
    kept = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    assert kept
    assert not [n for n in kept if ".cross" in n or n.partition(".")[2].startswith(TOWER)], "no state is kept of it"


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["single-full", "ddp-full", "ddp-lora", "zero3-full"])
def test_it_is_said(runs, cell):
    root, backend = runs[cell].parent, cell.partition("-")[0]
    logs = root / {"single": "logs-1", "ddp": "logs-2"}.get(backend, f"logs-{cell}")
    said = "".join(p.read_text() for p in sorted(logs.rglob("*")) if p.is_file())
    assert (
        "9,424 parameters in 66 tensors take no part in the loss of text and stay as they are: model.vision_tower"
        in said
    )
    assert ("linear layers among them match method.targets" in said) == (backend in ("single", "ddp"))


@pytest.mark.slow
def test_an_adapter_of_it_is_read_like_the_run(common, tmp_path, tritune, capfd):
    """The export has held it against PEFT; here our own reading of both, and generation. Biases that did not train are in
    the file, as PEFT writes them, or it could not be read as a whole."""
    root, settings = common
    overrides = [*METHODS["lora"][:-1], "method.bias=all", "method.modules_to_save=[language_model.norm]"]
    result = tritune(*settings, f"model.path={root / 'gemma3'}", *overrides, f"run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert "reloaded with PEFT" in result.err
    file = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    assert any(".vision_tower." in n and n.endswith(".bias") for n in file)
    assert not any("vision_tower" in n and "lora_" in n for n in file)
    losses, answers = [], []
    for source in (f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'run' / 'export'}"):
        given = [source, "backend.device=cpu", "data.max_length=160"]
        capfd.readouterr()
        assert run_verb(verbs.evaluate, [*given, f"data.test={root / 'rows.jsonl'}"]) == 0
        losses += re.findall(r"loss +([\d.]+)", capfd.readouterr().out)
        assert run_verb(verbs.generate, [*given[:2], "generate.max_new_tokens=4"], prompts=["1: the cat"]) == 0
        answers.append(capfd.readouterr().out)
    assert len(losses) == 2
    assert losses[0] == losses[1] != ""
    assert answers[0] == answers[1] != ""
