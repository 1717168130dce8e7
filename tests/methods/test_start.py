"""Training goes on from an adapter, or from the model that it makes of its base; what lies behind it is written down."""

from __future__ import annotations

import json
import shutil

import harness
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritune.launch import cli
from tritune.trainer.__main__ import main

METHODS = {
    "lora": [
        "method=lora",
        "method.rank=3",
        "method.alpha=9",
        "method.targets=[q_proj,down_proj]",
        "method.rslora=true",
    ],
    "dora": ["method=lora", "method.rank=3", "method.dora=true", "method.bias=none", "method.rank_pattern.o_proj=2"],
    "adapter": ["method=adapter", "method.size=5", "method.scale=2"],
    "prefix": ["method=prefix", "method.num_virtual_tokens=4"],
    "prompt": ["method=prompt", "method.num_virtual_tokens=4"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return harness.save_small_llama(tmp_path_factory.mktemp("base") / "model", 192)


def run(directory, sft_file, *words: str) -> dict:
    usual = [
        f"data.train={sft_file}", "data.validation_share=0.3", "data.max_length=160", "train.batch_size=8", "train.max_steps=2",
        "optim.lr=2e-2", "backend.device=cpu", "report.enabled=false", "evaluation.samples=0", f"run.dir={directory}",
    ]  # fmt: skip
    with harness.keeping_signals():
        assert main([*usual, *words]) == 0
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_it_begins_where_the_first_run_ended(base, sft_file, tmp_path, name, capfd):
    first = run(tmp_path / "first", sft_file, f"model.path={base}", *METHODS[name])
    tuned = first["eval"]["validation"]["tuned"]["loss"]
    assert tuned < first["eval"]["validation"]["base"]["loss"] - 0.01
    # Nothing but the method's name is given: the keys come with the adapter. A run's folder stands for its export.
    where = tmp_path / ("first" if name == "lora" else "first/export")
    second = run(tmp_path / "second", sft_file, f"model.path={where}", METHODS[name][0])
    assert second["eval"]["validation"]["base"]["loss"] == pytest.approx(tuned, rel=2e-6)
    assert second["eval"]["validation"]["tuned"]["loss"] < tuned
    assert (second["lineage"]["run"], second["lineage"]["step"]) == (str(tmp_path / "first"), 2)
    assert second["export"]["form"] == "adapter"
    assert "| went on from | step 2 of first" in (tmp_path / "second" / "export" / "README.md").read_text()
    capfd.readouterr()
    run(tmp_path / "second", sft_file, f"model.path={where}", METHODS[name][0])  # goes on with the run itself
    assert "resume    from step-00000002" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_merged_it_is_the_base_of_another(base, sft_file, tmp_path, method):
    first = run(tmp_path / "first", sft_file, f"model.path={base}", *METHODS["dora"])
    words = [f"model.path={tmp_path / 'first'}", "model.adapter_mode=merge", f"method={method}"]
    second = run(tmp_path / "second", sft_file, *words)
    assert second["eval"]["validation"]["base"]["loss"] == pytest.approx(
        first["eval"]["validation"]["tuned"]["loss"], rel=1e-5
    )
    assert second["export"]["form"] == {"full": "full", "lora": "merged"}[method]
    assert second["export"]["max_difference"] <= second["export"]["allowed"]


def test_it_goes_on_from_peft_s_own(base, sft_file, tmp_path):
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=r".*\.(q_proj|up_proj)", use_dora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape)).add_(0.02 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "peft")
    merged = theirs.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ours = run(tmp_path / "ours", sft_file, f"model.path={base}", f"model.adapter={tmp_path / 'peft'}", "method=lora")
    whole = run(
        tmp_path / "whole",
        sft_file,
        f"model.path={tmp_path / 'merged'}",
        f"model.tokenizer={base}",
        "method=full",
        "export.enabled=false",
    )
    losses = [found["eval"]["validation"]["base"]["loss"] for found in (ours, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_go_on_is_refused_with_a_remedy(base, sft_file, tmp_path, tritune):
    run(tmp_path / "first", sft_file, f"model.path={base}", *METHODS["prefix"], "train.max_steps=1")
    run(tmp_path / "bare", sft_file, f"model.path={base}", "method=lora", "export.enabled=false", "train.max_steps=1")
    given = [f"data.train={sft_file}", "data.max_length=160", "train.max_steps=1", "backend.device=cpu"]
    cases = [
        (["method=lora"], "its adapter is of method=prefix, and method=lora would train", "Give method=prefix"),
        (["method=prefix", "method.num_virtual_tokens=9"], "method.num_virtual_tokens=9: the adapter in", "Leave it out"),
        (["method=prefix", "model.adapter_mode=merge"], "cannot be merged into them", "Use model.adapter_mode=keep"),
        (["method=prefix", f"model.path={tmp_path / 'bare'}"], "it is a run that has no export", "tritune export run.dir="),
        (["method=lora", f"model.path={base}", f"model.adapter={base}"], "no adapter is there", "Give an adapter's folder"),
    ]  # fmt: skip
    for number, (words, rule, remedy) in enumerate(cases):
        path = [] if any(w.startswith("model.path") for w in words) else [f"model.path={tmp_path / 'first' / 'export'}"]
        found = tritune(*given, *path, *words, f"run.dir={tmp_path / str(number)}")
        assert found.code == 2, found.err
        assert rule in found.err
        assert remedy in found.err
        assert "Traceback" not in found.err


def test_a_run_is_read_and_goes_on_by_what_it_holds(base, sft_file, tmp_path, tritune):
    """Not by where the adapter lies, nor by another one that came to lie there."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, sft_file, f"model.path={base}", *METHODS["lora"])
    for mode in ("keep", "merge"):
        run(second / mode, sft_file, f"model.path={first}", "method=lora", f"model.adapter_mode={mode}")
    moved = shutil.move(first, tmp_path / "moved")
    given = [f"data.train={sft_file}", "data.validation_share=0.3", "data.max_length=160", "train.batch_size=8",
             "train.max_steps=2", "optim.lr=2e-2", "backend.device=cpu", "report.enabled=false",
             "evaluation.samples=0"]  # fmt: skip
    for mode in ("keep", "merge"):
        words = [f"run.dir={second / mode}", "method=lora", f"model.adapter_mode={mode}", f"model.path={moved}"]
        assert tritune(*given, *words).code == 0  # moved, and its folder's own export is found
    weights = moved / "export" / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    changed = tritune(
        *given, f"run.dir={second / 'merge'}", "method=lora", "model.adapter_mode=merge", f"model.path={moved}"
    )
    assert changed.code == 2
    assert "tensor(s) of the adapter that it began with differ" in changed.err
    shutil.rmtree(moved)
    held = [
        "evaluate",
        f"run.dir={second / 'keep'}",
        f"data.test={sft_file}",
        "backend.device=cpu",
        f"model.tokenizer={base}",
    ]
    assert cli.main(held) == 0  # its checkpoint holds all of the adapter


def test_what_would_be_lost_is_refused(base, sft_file, tmp_path, tritune):
    first = tmp_path / "first"
    run(first, sft_file, f"model.path={base}", *METHODS["lora"], "optim.lr=1e-7")
    given = [f"data.train={sft_file}", "data.max_length=160", "train.max_steps=1", "backend.device=cpu", "method=lora"]
    cases = [
        (["model.adapter_mode=merge", "model.storage=nf4"], "4 bits would lose it"),
        (
            ["model.adapter_mode=merge", "model.dtype=bfloat16"],
            "model.dtype=bfloat16: rounding the merged weights to it takes",
        ),
        ([f"export.dir={first / 'export'}"], "the adapter that it began with is there"),
    ]
    for words, said in cases:
        found = tritune(*given, f"model.path={first}", *words, f"run.dir={tmp_path / 'other'}")
        assert (found.code, "Traceback" in found.err) == (2, False), found.err
        assert said in found.err
    weights = first / "export" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for spoil, said in ((whole[: len(whole) // 2], "does not read"), (None, "holds NaN or Inf")):
        if spoil is None:
            weights.write_bytes(whole)
            save_file({n: t * torch.nan for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
        else:
            weights.write_bytes(spoil)
        for mode in ("keep", "merge"):
            found = tritune(
                *given, f"model.path={first}", f"model.adapter_mode={mode}", f"run.dir={tmp_path / 'other'}"
            )
            assert (found.code, "Traceback" in found.err) == (2, False), found.err
            assert said in found.err
