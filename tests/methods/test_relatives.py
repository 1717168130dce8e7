"""LoRA's relatives beside PEFT on the same model with the same numbers: logits, gradients, ten steps, files, merged weights."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.kernels.dropout import token_keys
from tritune.trainer.config import OptimConfig
from tritune.trainer.config.choices import Bias
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_io import save_adapter
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.dora import DoraLinear
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers, reset
from tritune.trainer.methods.merge import merged_tensors
from tritune.trainer.methods.states import whole
from tritune.trainer.methods.token_keys import TokenKeys
from tritune.trainer.model.optim import make_optimizer, set_rate
from tritune.trainer.model.quantized import Nf4Linear

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(7))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RATE = 1e-2


def base_of(family: str = "qwen2", **changes: Any):
    """A small model with random weights and biases, none of them zero: biases on some linear layers only."""
    settings = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
        "initializer_range": 0.2,
    }  # fmt: skip
    if family == "gpt2":
        settings = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
                    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.train()


@dataclass
class Case:
    """Settings of ours and PEFT's words for the same."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    family: str = "qwen2"
    changes: dict[str, Any] = field(default_factory=dict)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV = ["c_attn", "c_proj", "c_fc"]
RANKS = {r"layers\.1\..*": 5, "q_proj": 2}
ALPHAS = {"v_proj|mlp.up_proj": 9.0}
CASES = {
    "lora": Case({}, {}),
    "rslora": Case({"rslora": True}, {"use_rslora": True}),
    "dora": Case({"dora": True}, {"use_dora": True}),
    "dora, head": Case(
        {"dora": True, "targets": ["lm_head", "up_proj"]}, {"use_dora": True, "target_modules": ["lm_head", "up_proj"]}
    ),
    "dora, rslora": Case({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "dora, dropout": Case({"dora": True, "dropout": 0.3}, {"use_dora": True, "lora_dropout": 0.3}),
    "dora, biases": Case({"dora": True, "bias": Bias.lora_only}, {"use_dora": True, "bias": "lora_only"}),
    "lora plus": Case({"lora_plus_ratio": 8.0}, {}),
    "lora plus, dora, biases": Case(
        {"lora_plus_ratio": 4.0, "dora": True, "bias": Bias.all}, {"use_dora": True, "bias": "all"}
    ),
    "patterns": Case(
        {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}, {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    ),
    "patterns, dora, rslora": Case(
        {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "dora": True, "rslora": True},
        {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_dora": True, "use_rslora": True},
    ),
    "expression": Case(
        {"targets": [r"re:.*\.layers\.[1-9]\..*(q|up)_proj"]}, {"target_modules": r".*\.layers\.[1-9]\..*(q|up)_proj"}
    ),
    "gpt2": Case({}, {"target_modules": CONV, "fan_in_fan_out": True}, "gpt2"),
    "gpt2, dora": Case(
        {"dora": True, "dropout": 0.2},
        {"target_modules": CONV, "fan_in_fan_out": True, "use_dora": True, "lora_dropout": 0.2},
        "gpt2",
    ),
}


class SameDropout(nn.Module):
    """PEFT's layer drops what ours drops."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        layer = self.layer[0]
        return layer.keys.dropout(x, layer.layer_id, layer.p) if self.training else x


@torch.no_grad()
def pair(case: Case):
    """Our model and PEFT's with the same factors, B not zero and lengths not the base's; gradients' names, ours to theirs."""
    base = base_of(case.family, **case.changes)
    config = LoraConfig(**{"rank": 3, "alpha": 6.0, **case.ours})
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    keys = apply_method(config, ours, [], 0)
    if keys is not None:
        keys.set(token_keys(1, 2, torch.arange(4), 12))
    settings = {"r": 3, "lora_alpha": 6.0, "target_modules": ALL, "task_type": "CAUSAL_LM", **case.theirs}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    named, generator = dict(theirs.named_parameters()), torch.Generator().manual_seed(3)
    for name, layer in lora_layers(ours).items():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
        if config.dora:
            layer.magnitude_change.copy_(torch.randn(layer.magnitude_change.shape, generator=generator) * 0.05)
        where = f"base_model.model.{name}"
        for key, value in layer.saved(whole).items():
            theirs_key = key.removesuffix(".weight")
            named[f"{where}.{theirs_key}.default.weight"].copy_(value)
        if config.dropout:
            theirs.get_submodule(where).lora_dropout["default"] = SameDropout(layer)
    return config, base, ours, theirs.train()


def counterpart(name: str) -> str:
    """A trained parameter's name in PEFT's model."""
    name = name.replace(".magnitude_change", ".lora_magnitude_vector.default.weight")
    for factor in ("lora_A", "lora_B"):
        name = name.replace(f".{factor}", f".{factor}.default.weight")
    return f"base_model.model.{name}"


def loss_of(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def training(model) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_ten_steps_are_pefts(name):
    config, base, ours, theirs = pair(CASES[name])
    found, expected = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert (expected - base(input_ids=IDS).logits).abs().max() > 0.05, "the adapter must show"
    torch.testing.assert_close(found, expected, **CLOSE)
    mine, others = training(ours), training(theirs)
    assert {counterpart(n) for n in mine} == set(others)
    for model in (ours, theirs):
        loss_of(model).backward()
    for n, parameter in mine.items():
        assert parameter.grad.any(), n
        torch.testing.assert_close(parameter.grad, others[counterpart(n)].grad, **CLOSE)
    decay = 0.0 if config.dora else 0.1  # PEFT would let lengths decay, ours are vectors and do not
    optimizer = make_optimizer(OptimConfig(lr=RATE, weight_decay=decay), ours, config.rate_factor)
    judge = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=config.lora_plus_ratio, loraplus_weight_decay=decay
    )
    curves: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(10):
        for side, model, steps in (("ours", ours, optimizer), ("theirs", theirs, judge)):
            steps.zero_grad()
            loss = loss_of(model)
            loss.backward()
            if side == "ours":
                set_rate(optimizer, RATE)
            steps.step()
            curves[side].append(loss.item())
    assert curves["ours"] == pytest.approx(curves["theirs"], abs=1e-4)
    assert curves["ours"][-1] < curves["ours"][0] - 0.1


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_saved_and_merged_weights_compute_the_same(name, tmp_path):
    case = CASES[name]
    config, base, ours, theirs = pair(case)
    for model in (ours, theirs, base):
        model.eval()
    save_adapter(tmp_path, config, ours, [], None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = ours(input_ids=IDS).logits
        torch.testing.assert_close(read(input_ids=IDS).logits, expected, **CLOSE)
        merged = copy.deepcopy(base)
        merged.load_state_dict(dict(merged_tensors(ours, torch.float32, whole, print)))
        # W + s B A is rounded once more: 6e-8 of weights of about 1, over a few products
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, **CLOSE)
        for key, tensor in theirs.merge_and_unload().state_dict().items():
            torch.testing.assert_close(merged.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        assert said[key] == case.theirs.get(key, {} if key.endswith("pattern") else False), key


def test_dora_begins_as_the_base_does_to_the_bit():
    """In float32 and in bfloat16: the length is the base's own, and no factor beside it is rounded."""
    for dtype in (torch.float32, torch.bfloat16):
        base = base_of().to(dtype)
        model = copy.deepcopy(base)
        apply_method(LoraConfig(dora=True, rank=2), model, [], 0)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # as FSDP and ZeRO compute
        plain = copy.deepcopy(base)
        apply_method(LoraConfig(rank=2), plain, [], 0)
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(dtype)
        for name, layer in lora_layers(model).items():
            assert not layer._change().any(), name
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_a_row_without_a_direction_is_refused_by_its_layer():
    base = base_of()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3] = 0.0
    with pytest.raises(InputError, match=r"a row of model\.layers\.1\.mlp\.up_proj is zero"):
        apply_method(LoraConfig(dora=True), copy.deepcopy(base), [], 0)
    apply_method(LoraConfig(dora=True, exclude=["model.layers.1.mlp.up_proj"]), copy.deepcopy(base), [], 0)
    apply_method(LoraConfig(), base, [], 0)


def test_a_row_without_a_direction_that_comes_later_is_refused_in_the_first_forward():
    """Where no rank holds the model, weights are read after the layers were made."""
    config, name = LoraConfig(dora=True, rank=2), "model.layers.0.mlp.up_proj"
    layer = DoraLinear(nn.Linear(4, 3, device="meta"), config, name, None).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(layer.base_layer.weight[1])
    with pytest.raises(InputError, match=f"a row of {name} is zero"):
        layer(torch.ones(2, 4))
    nn.init.ones_(layer.base_layer.weight)
    assert layer(torch.ones(2, 4)).isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_quantised_base_is_dense_for_a_product_and_no_longer(dropout):
    """In four bits it computes what a base of the same rounded weights does, and keeps none of these for backward."""
    torch.manual_seed(2)
    plain, keys = nn.Linear(64, 128), TokenKeys()
    quantised = Nf4Linear(plain)
    with torch.no_grad():
        plain.weight.copy_(quantised.weight)
    config, x, found = LoraConfig(dora=True, rank=2, dropout=dropout), torch.randn(1, 5, 64, requires_grad=True), []
    keys.set(token_keys(0, 1, torch.arange(1), 5))
    for base in (plain, quantised):
        layer, kept = DoraLinear(base.requires_grad_(False), config, "layer", keys), []
        reset(layer, 0)
        torch.manual_seed(3)
        nn.init.normal_(layer.lora_B), nn.init.normal_(layer.magnitude_change, std=0.1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            y = layer(x)
        trained = [layer.lora_A, layer.lora_B, layer.magnitude_change]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    assert not [t for t in kept if t.is_floating_point() and t.numel() >= 64 * 128]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_only_dora_layers_learn_lengths():
    model = base_of()
    apply_method(LoraConfig(dora=True, targets=["q_proj"]), model, [], 0)
    layers = lora_layers(model)
    assert all(isinstance(layer, DoraLinear) for layer in layers.values())
    assert {n for n in training(model) if "magnitude" in n} == {f"{n}.magnitude_change" for n in layers}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_decides_nothing_is_refused(key):
    for patterns, wrong in (({"absent": 4}, "absent"), ({".*_proj": 4, "q_proj": 2}, "q_proj"), ({"proj": 4}, "proj")):
        with pytest.raises(InputError, match=rf"method\.{key}\.{wrong}"):
            apply_method(LoraConfig(**{key: patterns}), base_of(), [], 0)


def test_expressions_match_whole_names():
    model = base_of()
    apply_method(LoraConfig(targets=[r"re:model\.layers\.\d+\.mlp\.\w+"], exclude=["re:.*down.*"]), model, [], 0)
    assert {n.rpartition(".")[2] for n in lora_layers(model)} == {"gate_proj", "up_proj"}
    with pytest.raises(InputError, match="no linear layer has this name"):
        apply_method(LoraConfig(targets=["re:q_proj"]), base_of(), [], 0)
