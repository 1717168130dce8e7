"""What is said of experts that transformers keeps in one parameter: named as frozen, refused as a target, trained whole."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_io import save_adapter
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers

FAMILIES = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 4},
}
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(7))


def experts(family: str):
    settings = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **FAMILIES[family]))
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_linear_leaves_frozen_is_said_by_name(family):
    model, config = experts(family), LoraConfig(rank=2)
    apply_method(config, model, [], 0)
    assert {n.rpartition(".")[2] for n in lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    adapted, frozen, remedy = config.describe(model, ())
    assert adapted == "LoRA adapts 8 linear layers: q_proj x 2, k_proj x 2, v_proj x 2, o_proj x 2"
    left = 2 * (4 * 48 * 16 + 4 * 16 * 24 + 4 * 16)
    assert frozen.startswith(f"{left:,} parameters stay frozen, since no linear layer holds them: ")
    for said in (
        "experts.gate_up_proj [4, 48, 16] x 2", "experts.down_proj [4, 16, 24] x 2", "mlp.gate.weight [4, 16] x 2"
    ):  # fmt: skip
        assert f"model.layers.*.{said.removeprefix('mlp.')}" in frozen.replace(".mlp.", ".")
    assert set(remedy.partition("[")[2].partition("]")[0].split(",")) == {"experts", "gate"}


def test_what_is_no_expert_and_what_was_named_one_by_one_says_no_more():
    model, config = experts("mixtral"), LoraConfig(rank=2, dora=True, rslora=True, targets=["q_proj"])
    apply_method(config, model, [], 0)
    assert config.describe(model, ()) == ["LoRA (DoRA, rank-stabilised) adapts 2 linear layers: q_proj x 2"]


@pytest.mark.parametrize("target", ["gate_up_proj", "experts.down_proj", "experts", "re:.*experts.*"])
def test_experts_as_a_target_are_refused_and_the_remedy_works(target, tmp_path):
    with pytest.raises(InputError, match="holds the matrices of all experts in one parameter") as refused:
        apply_method(LoraConfig(targets=["q_proj", target]), experts("mixtral"), [], 0)
    assert "method.modules_to_save=[experts]" in refused.value.remedy
    base = experts("mixtral")
    model, config = copy.deepcopy(base), LoraConfig(rank=2, targets=["q_proj"], modules_to_save=["experts"])
    apply_method(config, model, [], 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = dict(base.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    assert not torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, moved)
    save_adapter(tmp_path, config, model, [], None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(read(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_model_leaves_nothing():
    settings = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    for family, more in (
        ("gpt2", {}),
        ("llama", {"intermediate_size": 24, "hidden_size": 16, "num_attention_heads": 4}),
    ):
        config = AutoConfig.for_model(family, **(settings if family == "gpt2" else {"vocab_size": 50, **more}))
        config.num_hidden_layers = 1
        model, method = AutoModelForCausalLM.from_config(config), LoraConfig(rank=2)
        apply_method(method, model, [], 0)
        assert len(method.describe(model, ())) == 1


def test_a_run_says_it_at_its_start(tritune, tiny, tmp_path):
    """A whole run of a small Mixtral, and its merged export read back by transformers."""
    words = [
        "model.config={model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_local_experts: 4, "
        "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 160}",
        "method=lora", "method.rank=2", "train.max_steps=1", "export.enabled=true", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = tritune(*(word for word in tiny if not word.startswith(("model.config", "export"))), *words)
    assert done.code == 0, done.err
    assert "method    LoRA adapts 4 linear layers: q_proj x 1, k_proj x 1, v_proj x 1, o_proj x 1" in done.err
    assert "stay frozen, since no linear layer holds them: model.layers.*.mlp" in done.err
    assert "the routers' balancing loss (router_aux_loss_coef=0.001) is not added" in done.err
