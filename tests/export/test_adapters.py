"""Adapters opened again: our own, those that PEFT wrote, and those that would compute something else here."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.launch.cli import main as cli
from tritune.trainer.compose import load_config
from tritune.trainer.config_backends import BackendConfig
from tritune.trainer.distributed import start
from tritune.trainer.errors import InputError
from tritune.trainer.open import open_model
from tritune.trainer.tokenizer import byte_tokenizer

IDS = torch.randint(5, 261, (3, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def base(tmp_path) -> Path:
    """A small untied Llama with biases, all of them drawn at random; saved with its tokenizer."""
    where, tokenizer = tmp_path / "base", byte_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
                "attention_bias": True, "mlp_bias": True}  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def common(sft_file, base) -> list[str]:
    return [
        f"data.train={sft_file}", f"model.path={base}", "data.max_length=128", "train.batch_size=8", "seed=3",
        "train.max_steps=4", "optim.lr=2e-2", "optim.warmup_ratio=0", "backend.device=cpu", "report.enabled=false",
        "evaluation.samples=0", "method=lora", "method.rank=4", "method.alpha=6",
    ]  # fmt: skip


def read(*overrides: str, run: Path | None = None):
    kept = yaml.safe_load((run / "config.yaml").read_text()) if run else None
    given = [*overrides, *([f"run.dir={run}"] if run else [])]
    config = load_config(given, kept=kept, training=False)
    return open_model(config, run, start(BackendConfig(), False))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def require_close(found, expected, untouched, atol: float = 1e-6) -> None:
    assert float((expected - untouched).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol)


EXTRAS = {
    "plain": [],
    "bias all": ["method.bias=all"],
    "bias of adapted layers": ["method.bias=lora_only", "method.targets=[q_proj,down_proj]"],
    "saved modules": ["method.modules_to_save=[embed_tokens,lm_head,norm]"],
    "some layers": ["method.targets=['model.layers.1.*']", "method.exclude=[up_proj]"],
}


def few(*fast):
    """Every case of `EXTRAS`; all but these are left to the slow tests."""
    return [e if e in fast else pytest.param(e, marks=pytest.mark.slow) for e in EXTRAS]


@pytest.mark.parametrize("extra", few("bias all"))
def test_our_adapter_opened_again(tritune, common, base, tmp_path, extra):
    run = tmp_path / "run"
    result = tritune(*common, *EXTRAS[extra], f"run.dir={run}")
    assert result.code == 0, result.err
    trained = logits(read(run=run).model)
    untouched = logits(AutoModelForCausalLM.from_pretrained(base))
    require_close(logits(read(f"model.path={run / 'export'}").model), trained, untouched)
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "export")
    torch.testing.assert_close(logits(stock), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", few("bias of adapted layers"))
def test_the_verb_exports_all_that_was_trained(tritune, common, base, tmp_path, capfd, extra):
    """Biases and saved modules too, in a process that trains nothing."""
    run = tmp_path / "run"
    assert tritune(*common, *EXTRAS[extra], "export.enabled=false", f"run.dir={run}").code == 0
    code = cli(["export", f"run.dir={run}", "export.form=adapter"])
    assert code == 0, capfd.readouterr().err
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "export")
    trained = logits(read(run=run).model)
    torch.testing.assert_close(logits(stock), trained, rtol=1e-5, atol=1e-5)


def test_far_positions_in_bfloat16(base):
    """Rotary frequencies are buffers in float32, as transformers loads them and as training keeps them: rounded to bfloat16
    they are off by 0.4 %, which at position 1500 is a full turn."""
    settings = AutoConfig.from_pretrained(base)
    settings.max_position_embeddings = 2048
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(settings).save_pretrained(base)
    ids = torch.randint(5, 261, (1, 2048), generator=torch.Generator().manual_seed(3))
    exact, stock = (AutoModelForCausalLM.from_pretrained(base, dtype=d).eval() for d in (torch.float32, torch.bfloat16))
    ours = read(f"model.path={base}", "model.dtype=bfloat16").model
    assert next(ours.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        exact, stock, ours = (m(input_ids=ids).logits.double() for m in (exact, stock, ours))
    assert (ours - exact).abs().mean() <= 1.1 * (stock - exact).abs().mean()


@pytest.mark.slow
def test_a_moved_adapter_finds_a_base_beside_it(tritune, common, base, tmp_path):
    """`base_model_name_or_path` may be a folder inside the adapter's own, as a copy taken to another machine has it."""
    run = tmp_path / "run"
    assert tritune(*common, f"run.dir={run}").code == 0
    trained = logits(read(run=run).model)
    path = run / "export" / "adapter_config.json"
    base.rename(run / "export" / "base")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    torch.testing.assert_close(logits(read(f"model.path={run / 'export'}").model), trained, rtol=1e-6, atol=1e-6)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="which model"):
        read(f"model.path={run / 'export'}")


# -- PEFT's -----------------------------------------------------------------------------------------------


def write_with_peft(base: Path, where: Path, auto=AutoModelForCausalLM, options=None, **settings):
    """A PEFT model whose adapter is moved away from zero, saved; return its logits."""
    torch.manual_seed(7)
    model = auto.from_pretrained(base, **(options or {}))
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        **settings,
    }
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(where)
    return logits(model)


PEFT = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "excluded": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_that_peft_wrote(base, tmp_path, kind):
    theirs = write_with_peft(base, tmp_path / "adapter", **PEFT[kind])
    untouched = logits(AutoModelForCausalLM.from_pretrained(base))
    opened = read(f"model.path={tmp_path / 'adapter'}")
    require_close(logits(opened.model), theirs, untouched, atol=1e-5)  # its sums run in another order


def test_a_classifiers_adapter_that_peft_wrote(base, tmp_path):
    """PEFT adds `classifier` and `score` to its `modules_to_save`; which of them the model has is another matter."""
    options = {"num_labels": 3, "pad_token_id": 0}
    where = tmp_path / "adapter"
    theirs = write_with_peft(base, where, AutoModelForSequenceClassification, options, task_type="SEQ_CLS")
    assert "score" in json.loads((where / "adapter_config.json").read_text())["modules_to_save"]
    opened = read(f"model.path={where}", "objective=classify", "data.labels=[a,b,c]")
    assert opened.heads == ["score"]
    torch.testing.assert_close(logits(opened.model), theirs, rtol=1e-6, atol=1e-5)


FOREIGN = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"down_proj": 64}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "trainable tokens": {"trainable_token_indices": [7, 8]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "alora": {"alora_invocation_tokens": [7, 8]},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_adapters_are_refused_or_right(base, tmp_path, kind):
    """Each of these computes something that plain LoRA does not: silently another model is the one forbidden answer."""
    where = tmp_path / "adapter"
    theirs = write_with_peft(base, where, **FOREIGN[kind])
    reloaded = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), where))
    try:
        opened = read(f"model.path={where}")
    except InputError:
        return
    assert kind not in ("dora", "rslora"), "these are refused"
    found = logits(opened.model)
    assert min(float((found - r).abs().max()) for r in (theirs, reloaded)) < 1e-4


def test_other_kinds_of_adapter_are_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"],
                                                      feedforward_modules=["down_proj"]))  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="IA3"):
        read(f"model.path={tmp_path / 'adapter'}")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    write_with_peft(base, tmp_path / "adapter")
    settings = AutoConfig.from_pretrained(base)
    settings.hidden_size = 16
    AutoModelForCausalLM.from_config(settings).save_pretrained(base)
    with pytest.raises(InputError, match="does not fit"):
        read(f"model.path={tmp_path / 'adapter'}")


def test_half_an_adapter_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    write_with_peft(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(n for n in tensors if "lora_B" in n))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing"):
        read(f"model.path={tmp_path / 'adapter'}")
