"""What must not be exported is refused, and a write that went wrong leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.launch.cli import main as cli
from tritune.trainer.errors import InputError
from tritune.trainer.export import write
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.merge import merged_tensors
from tritune.trainer.methods.states import whole

LORA = ["method=lora", "method.rank=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small tied Llama with random weights, saved with its tokenizer."""
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 256)


@pytest.fixture
def common(sft_file, base) -> list[str]:
    return [
        f"data.train={sft_file}", f"model.path={base}", "data.max_length=128", "train.batch_size=8",
        "train.max_steps=2", "optim.lr=2e-2", "optim.warmup_ratio=0", "backend.device=cpu", "report.enabled=false",
        "evaluation.samples=0",
    ]  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def one_message(err: str) -> str:
    """The user's message: one, without a traceback."""
    assert "Traceback" not in err
    assert err.count("tritune: ") == 1
    return err[err.index("tritune: ") :]


# -- forms that cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "form"),
    [("full", "adapter"), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("full", "merged"), ("lora", "full")))],
)
def test_a_form_that_the_method_does_not_make(tritune, common, tmp_path, capfd, method, form):
    run = tmp_path / "run"
    result = tritune(*common, f"method={method}", f"export.form={form}", f"run.dir={run}")
    assert result.code == 2
    assert f"export.form={form}" in one_message(result.err)
    assert not run.exists(), "refused before anything is done"
    assert tritune(*common, f"method={method}", f"run.dir={run}").code == 0
    before = hashes(run)
    capfd.readouterr()
    assert cli(["export", f"run.dir={run}", f"export.form={form}"]) == 2
    assert f"export.form={form}" in one_message(capfd.readouterr().err)
    assert hashes(run) == before


def test_merging_into_a_tied_output_head(tritune, common, tmp_path):
    options = [*LORA, "method.targets=[all-linear,lm_head]", "export.form=merged"]
    result = tritune(*common, *options, f"run.dir={tmp_path}")
    assert result.code == 2
    message = one_message(result.err)
    assert "export.form=merged" in message
    assert "adapter" in message
    assert not list(tmp_path.glob("export*"))
    assert not list(tmp_path.glob(".partial*"))


def test_what_cannot_be_exported_is_refused_before_training(tritune, tiny, common, tmp_path):
    """All that is known from the configuration and the model: not after the last step of a long run."""
    tied = [*common, *LORA, "method.targets=[all-linear,lm_head]", "export.form=merged"]
    assert tritune(*tied, f"run.dir={tmp_path / 'tied'}").code == 2
    random = [*tiny, *LORA, "export.enabled=true", "export.form=adapter"]
    assert tritune(*random, f"run.dir={tmp_path / 'random'}").code == 2
    assert [p for p in ("tied", "random") if (tmp_path / p / "metrics.jsonl").exists()] == []


@pytest.mark.slow
def test_an_adapter_of_a_tied_output_head_is_right(tritune, common, base, tmp_path):
    """The same run as an adapter: PEFT adapts the head alone."""
    from peft import PeftModel

    run = tmp_path / "run"
    options = [*LORA, "method.targets=[all-linear,lm_head]", "export.form=adapter"]
    result = tritune(*common, *options, f"run.dir={run}")
    assert result.code == 0, result.err
    stock = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(stock, run / "export").eval()
    weights = load_file(run / "export" / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.lm_head.lora_{m}.weight"].double() for m in "AB")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        hidden = model.base_model.model.model(input_ids=ids).last_hidden_state.double()
        head = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
        expected = hidden @ (head + 32 / 4 * b @ a).T
        torch.testing.assert_close(model(input_ids=ids).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_merging_into_a_quantised_base(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    apply_method(LoraConfig(rank=2), model, [], 0)
    said: list[str] = []
    assert dict(merged_tensors(model, torch.float32, whole, said.append))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(InputError, match="quantised"):
        dict(merged_tensors(model, torch.float32, whole, said.append))


@pytest.mark.parametrize("where", ["export", pytest.param("model", marks=pytest.mark.slow)])
def test_an_update_that_rounding_would_swallow(tritune, common, tmp_path, where):
    """bfloat16 keeps 8 bits: an update a thousand times smaller than the weights is gone after merging."""
    options = [*LORA, "optim.lr=1e-5", "method.alpha=0.01", "export.form=merged", f"{where}.dtype=bfloat16"]
    result = tritune(*common, *options, f"run.dir={tmp_path}")
    assert result.code == 2
    assert "rounding" in one_message(result.err)
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".partial*"))


# -- a write that goes wrong ----------------------------------------------------------------------------


def perturb(file: Path, name_part: str) -> None:
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if name_part in n)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def corrupt(monkeypatch):
    """Return a function: from now on, one tensor of what is written is 1e-3 off."""
    adapter, stream = write.save_adapter, write.write_tensors

    def bad_adapter(directory, *rest):
        size = adapter(directory, *rest)
        perturb(directory / "adapter_model.safetensors", "q_proj.lora_B")
        return size

    def bad_whole(directory, *rest):
        size = stream(directory, *rest)
        perturb(directory / "model.safetensors", "layers.1.mlp.down_proj")
        return size

    def begin():
        monkeypatch.setattr(write, "save_adapter", bad_adapter)
        monkeypatch.setattr(write, "write_tensors", bad_whole)

    return begin


@pytest.mark.parametrize("form", ["adapter", *(pytest.param(f, marks=pytest.mark.slow) for f in ("full", "merged"))])
def test_a_corrupted_write_is_caught(tritune, common, tmp_path, capfd, corrupt, form):
    run, target = tmp_path / "run", tmp_path / "out" / "export"
    method = ["method=full"] if form == "full" else LORA
    assert tritune(*common, *method, f"export.form={form}", f"run.dir={run}").code == 0
    assert cli(["export", f"run.dir={run}", f"export.dir={target}"]) == 0
    good, whole_run = hashes(target), hashes(run)
    corrupt()
    capfd.readouterr()
    assert cli(["export", f"run.dir={run}", f"export.dir={target}"]) == 1
    message = one_message(capfd.readouterr().err)
    assert "another model than was trained" in message
    assert hashes(target) == good, "the older export is untouched"
    assert cli(["export", f"run.dir={run}", f"export.dir={tmp_path / 'new' / 'export'}"]) == 1
    assert [p for p in (tmp_path / "out").iterdir() if p != target] == []
    assert list((tmp_path / "new").iterdir()) == [], "nothing is left at a new target"
    assert hashes(run) == whole_run


def test_a_corrupted_write_at_the_end_of_a_run_fails_it(tritune, common, tmp_path, corrupt):
    corrupt()
    result = tritune(*common, f"run.dir={tmp_path}")
    assert result.code == 1
    assert "another model than was trained" in result.err
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".partial*"))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir(), "what was trained is kept"


@pytest.mark.slow
def test_auto_does_not_hide_a_corrupted_whole_model(tritune, common, tmp_path, corrupt):
    """The fallback of `auto` from adapter to merged must not become a way around the comparison."""
    corrupt()
    result = tritune(*common, *LORA, f"run.dir={tmp_path}")
    assert result.code == 1
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("target", ["base", *(pytest.param(t, marks=pytest.mark.slow) for t in ("notes", "run"))])
def test_an_export_replaces_exports_and_nothing_else(tritune, common, tmp_path, base, target, capfd):
    """`export.dir` may be a slip of the hand: a folder of someone's files, the base model, the run itself."""
    import shutil

    run, own = tmp_path / "run", tmp_path / "own"
    shutil.copytree(base, own)
    plain = [o for o in common if not o.startswith("model.path=")]
    assert tritune(*plain, *LORA, f"model.path={own}", "export.enabled=false", f"run.dir={run}").code == 0
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("the only copy")
    folder = {"notes": notes, "base": own, "run": run}[target]
    before = hashes(folder)
    cli(["export", f"run.dir={run}", f"export.dir={folder}"])
    after = hashes(folder)
    assert {n: h for n, h in after.items() if n in before} == before


# -- auto -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_falls_back_to_merged_where_stock_transformers_loads_the_base_wrongly(
    tritune, label_file, shared, tmp_path, capfd
):
    """A classifier made of a checkpoint whose tied matrix is there only as `lm_head.weight`: stock embeddings are random."""
    run = tmp_path / "run"
    options = [*LORA, "objective=classify", f"data.train={label_file}", "train.max_steps=3", "optim.lr=2e-2",
               f"model.path={shared / 'models' / 'tinystories-656k'}", "data.max_length=96", "train.batch_size=8",
               "backend.device=cpu", "report.enabled=false", "evaluation.samples=0"]  # fmt: skip
    result = tritune(*options, f"run.dir={run}")
    assert result.code == 0, result.err
    said = [line for line in result.lines() if line.startswith("export")]
    assert any("no adapter" in line for line in said)
    assert any("merged" in line and "instead" in line for line in said)
    assert json.loads((run / "summary.json").read_text())["export"]["form"] == "merged"
    assert not (run / "export" / "adapter_config.json").exists()
    model, info = AutoModelForSequenceClassification.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    capfd.readouterr()
    assert cli(["export", f"run.dir={run}", "export.form=adapter"]) == 1
    assert (run / "export" / "model.safetensors").is_file(), "what was there stays"
