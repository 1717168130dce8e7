"""Logits while one module's parameters exist at a time, against the same model whole, for each family that is loaded so."""

from __future__ import annotations

import copy

import pytest
import torch
from test_scorer import VOCAB, build
from torch import nn
from transformers import AutoModelForSequenceClassification
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.model.by_module import logits_by_module
from tritune.trainer.model.scorer import TESTED_FAMILIES

IDS = torch.randint(5, VOCAB - 5, (2, 17), generator=torch.Generator().manual_seed(3))


def emptied(model):
    """A copy whose parameters are meta tensors, each the same under every name; and how their values are read."""
    empty, found = copy.deepcopy(model), {}
    made: dict[int, nn.Parameter] = {}
    for (_, old), (_, module) in zip(model.named_modules(), empty.named_modules(), strict=True):
        for name, parameter in list(module.named_parameters(recurse=False)):
            meta = nn.Parameter(torch.empty_like(parameter, device="meta"))
            value = getattr(old, name)
            setattr(module, name, made.setdefault(id(value), meta))
            found[id(made[id(value)])] = value.detach()
    return empty, lambda tensor: found[id(tensor)]


@torch.no_grad()
def require_same(model, dtype=torch.float32):
    empty, read = emptied(model)
    got = logits_by_module(empty, read, dtype, IDS)
    assert {p.device.type for p in empty.parameters()} == {"meta"}, "they are gone once it has computed"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(got, model(input_ids=IDS, use_cache=False).logits)
    assert got.dtype is dtype


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_the_logits_of_the_whole_model(family):
    require_same(build(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_adapted_layers_and_of_a_classifier(dtype):
    model = build("qwen3", AutoModelForSequenceClassification, num_labels=3)
    apply_method(LoraConfig(rank=3, dropout=0.5), model, ["score"], 0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    require_same(model.eval(), dtype)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = build("llama")
    empty, read = emptied(model)
    with pytest.raises(IndexError):
        logits_by_module(empty, read, torch.float32, torch.full((1, 3), VOCAB))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert torch.equal(logits_by_module(empty, read, torch.float32, IDS), model(input_ids=IDS).logits)
