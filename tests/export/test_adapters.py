"""Our own adapters opened again, here and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.launch.cli import main as cli
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.config.compose import load_config
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.open import open_model
from tritune.trainer.parallel.distributed import start

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
    require_close(
        logits(read(f"model.path={run / 'export'}").model), trained, untouched, atol=1e-5
    )  # PEFT's order of sums
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
    torch.testing.assert_close(logits(read(f"model.path={run / 'export'}").model), trained, rtol=1e-5, atol=1e-5)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="which model"):
        read(f"model.path={run / 'export'}")
