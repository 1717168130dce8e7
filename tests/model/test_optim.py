"""Learning-rate schedules at their boundaries and against transformers'; which parameters decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from tritune.trainer.config import OptimConfig
from tritune.trainer.config.choices import Bias, Schedule
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.model.optim import learning_rate, make_optimizer, warmup_steps

# A factor takes half a dozen operations in double precision, of numbers not above 1 (a cosine of up to pi among them).
CLOSE = {"rel": 1e-14, "abs": 1e-15}


def optim(schedule="cosine", **settings) -> OptimConfig:
    return OptimConfig(lr=1.0, schedule=Schedule(schedule), **{"warmup_ratio": 0.0, **settings})


def curve(config, total) -> list[float]:
    return [learning_rate(config, step, total) for step in range(total)]


def theirs(make, total, **settings) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **settings)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, 99])
@pytest.mark.parametrize("total", [100, 101])
def test_against_transformers(warmup, total):
    """After the warm-up the definitions agree. In it they do not: transformers' first step is zero, ours is not."""
    common = {"num_warmup_steps": warmup, "num_training_steps": total}
    pairs = [
        (optim("linear", warmup_steps=warmup), theirs(get_linear_schedule_with_warmup, total, **common)),
        (optim("cosine", warmup_steps=warmup), theirs(get_cosine_schedule_with_warmup, total, **common)),
        (
            optim("cosine", warmup_steps=warmup, min_lr_ratio=0.1),
            theirs(get_cosine_with_min_lr_schedule_with_warmup, total, min_lr_rate=0.1, **common),
        ),
    ]
    for config, expected in pairs:
        rates = curve(config, total)
        assert rates[warmup:] == pytest.approx(expected[warmup:], **CLOSE)
        assert rates[:warmup] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup)], **CLOSE)
        assert rates[0] > 0


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 10])
def test_warmup_stable_decay_against_transformers(warmup, floor):
    config = optim("wsd", warmup_steps=warmup, decay_ratio=0.3, min_lr_ratio=floor)
    expected = theirs(
        get_wsd_schedule, 100, num_warmup_steps=warmup, num_decay_steps=30, num_training_steps=100, decay_type="linear",
        min_lr_ratio=floor,
    )  # fmt: skip
    assert curve(config, 100)[warmup:] == pytest.approx(expected[warmup:], **CLOSE)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_every_rate_is_sane(schedule, total, warmup, floor):
    config = optim(schedule, warmup_steps=warmup, min_lr_ratio=floor)
    rates = curve(config, total)
    assert all(0 < r <= 1 + 1e-15 for r in rates), "never zero before the end, never above lr"
    assert all(a < b for a, b in pairwise(rates[: warmup + 1])), "rising in the warm-up"
    after = rates[warmup:]
    assert all(a >= b - 1e-15 for a, b in pairwise(after)), "never rising after it"
    assert all(r >= floor - 1e-15 for r in after)
    if warmup < total and (schedule is not Schedule.wsd or warmup <= total - math.ceil(0.2 * total)):
        assert rates[warmup] == pytest.approx(1.0, **CLOSE), "the first step after the warm-up has the whole rate"


def test_the_ends():
    """At step `total`, which is never taken, a schedule has arrived at its floor."""
    for schedule in ("linear", "cosine", "wsd"):
        for floor in (0.0, 0.3):
            config = optim(schedule, warmup_steps=5, min_lr_ratio=floor)
            assert learning_rate(config, 100, 100) == pytest.approx(floor, abs=1e-15)
            assert learning_rate(config, 99, 100) > floor
    assert learning_rate(optim("constant", warmup_steps=5), 99, 100) == 1.0
    halfway = {"linear": 0.5, "cosine": 0.5, "wsd": 1.0, "constant": 1.0}
    for schedule, value in halfway.items():
        assert learning_rate(optim(schedule), 50, 100) == pytest.approx(value, **CLOSE)
    wsd = optim("wsd", decay_ratio=0.2)
    assert [learning_rate(wsd, s, 100) for s in (79, 80, 81, 90)] == pytest.approx([1.0, 1.0, 0.95, 0.5], **CLOSE)


def test_warmup_steps():
    assert warmup_steps(optim(warmup_ratio=0.03), 1000) == 30
    assert warmup_steps(optim(warmup_ratio=0.03), 10) == 1, "rounded up"
    assert warmup_steps(optim(warmup_ratio=0.0), 10) == 0
    assert warmup_steps(optim(warmup_ratio=0.5, warmup_steps=3), 10) == 3, "a count comes before a share"
    assert warmup_steps(optim(warmup_ratio=0.5, warmup_steps=0), 10) == 0


def test_the_rate_scales_with_lr():
    config = optim("cosine", warmup_steps=3)
    small = OptimConfig(lr=3e-5, schedule=Schedule.cosine, warmup_steps=3)
    for step in (0, 2, 3, 50, 99):
        assert learning_rate(small, step, 100) == pytest.approx(3e-5 * learning_rate(config, step, 100), rel=1e-14)


# -- groups ----------------------------------------------------------------------------------------------


def model_of(model_type, tied, auto=AutoModelForCausalLM, **changes):
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": tied, "pad_token_id": 0,
    }  # fmt: skip
    return auto.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))


def groups(optimizer, model) -> tuple[set[str], set[str]]:
    """Names that decay, names that do not."""
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    keep = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    count = sum(len(g["params"]) for g in optimizer.param_groups)
    assert count == len(decay | keep) == len(decay) + len(keep), "each parameter once"
    return decay, keep


@pytest.mark.parametrize("tied", [False, True])
def test_norms_biases_and_embeddings_do_not_decay(tied):
    model = model_of("qwen2", tied)
    decay, keep = groups(make_optimizer(OptimConfig(lr=1e-4, weight_decay=0.1), model), model)
    matrices = {n for n in dict(model.named_parameters()) if n.endswith("proj.weight")}
    assert len(matrices) == 14
    assert decay == matrices | (set() if tied else {"lm_head.weight"})
    assert "model.embed_tokens.weight" in keep
    assert {n for n in keep if n.endswith("norm.weight")}
    assert {n for n in keep if n.endswith("bias")}
    assert decay | keep == set(dict(model.named_parameters()))


def test_gpt2_positions_do_not_decay():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    )
    decay, keep = groups(make_optimizer(OptimConfig(lr=1e-4, weight_decay=0.1), model), model)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= keep
    assert decay == {f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_lora_groups_hold_only_what_trains():
    model = model_of("qwen2", tied=False)
    apply_method(
        LoraConfig(rank=2, targets=["q_proj"], bias=Bias.lora_only, modules_to_save=["embed_tokens"]), model, [], 0
    )
    decay, keep = groups(make_optimizer(OptimConfig(lr=1e-4, weight_decay=0.1), model), model)
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert decay == {f"{n}.{f}" for n in q for f in ("lora_A", "lora_B")}
    assert keep == {f"{n}.base_layer.bias" for n in q} | {"model.embed_tokens.weight"}


def test_a_new_classification_head_decays():
    model = model_of("qwen2", True, AutoModelForSequenceClassification, num_labels=3)
    decay, _ = groups(make_optimizer(OptimConfig(lr=1e-4, weight_decay=0.1), model), model)
    assert "score.weight" in decay


def test_settings_arrive():
    model = model_of("llama", True)
    optimizer = make_optimizer(OptimConfig(lr=3e-4, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1), model)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    assert sorted(g["weight_decay"] for g in optimizer.param_groups) == [0.0, 0.1]


def test_one_step_is_adamw():
    """Loshchilov and Hutter's update written out, in float64: decay on the matrix, none on the vector."""
    config = OptimConfig(lr=0.1, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.5)
    model = nn.Linear(3, 2).double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(config, model)
    model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        m, v = 0.1 * grad / (1 - 0.9), 0.01 * grad**2 / (1 - 0.99)
        decayed = start[name] * (1 - 0.1 * (0.5 if name == "weight" else 0.0))
        torch.testing.assert_close(parameter.detach(), decayed - 0.1 * m / (v.sqrt() + 1e-8), rtol=1e-12, atol=1e-12)
