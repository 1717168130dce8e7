"""NF4 as the storage of a frozen base: against bitsandbytes and PEFT, on every backend, and what it costs."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.kernels.nf4 import from_bitsandbytes, quantize
from tritune.kernels.nf4_bytes import from_bytes, num_bytes, to_bytes
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.model.quantized import Nf4Linear, quantize_layers, quantized_layers, round_trip

SETTINGS = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SETTINGS)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (7, 129), (300, 257)])
def test_bytes_hold_the_weight(shape):
    weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    data = to_bytes(weight)
    assert data.dtype is torch.uint8
    assert data.numel() == num_bytes(torch.Size(shape))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]  # as a piece of an engine's flat buffer lies
    for held in (data, shifted):
        assert torch.equal(
            from_bytes(held, torch.Size(shape)).dequantize(torch.float32), weight.dequantize(torch.float32)
        )


def test_a_large_weight_takes_at_most_053_bytes_a_value():
    shape = torch.Size((14336, 4096))
    assert num_bytes(shape) / shape.numel() < 0.53


def test_logits_and_gradients_are_those_of_bitsandbytes_and_peft():
    theirs, ours = small(), small()
    quantize_layers(ours, [])
    for name, layer in quantized_layers(ours).items():
        dense = theirs.get_submodule(name)
        packed = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bnb.nn.Params4bit(dense.weight.data, quant_type="nf4", compress_statistics=True)
        packed.to("cpu")
        parent, _, child = name.rpartition(".")
        setattr(theirs.get_submodule(parent), child, packed)
        # On the CPU bitsandbytes rounds scales more coarsely than on a GPU (kernels/nf4.py): its values are taken over.
        layer.nf4.data = to_bytes(from_bitsandbytes(packed.weight.data, packed.weight.quant_state))
    config = LoraConfig(rank=4, alpha=8.0, targets=["all-linear"])
    apply_method(config, ours, [], 3)
    settings = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, settings)
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
            for key in ("lora_A", "lora_B"):
                named[f"base_model.model.{name}.{key}.default.weight"].copy_(getattr(layer, key))
    ids = torch.arange(48).view(2, 24) * 3 % 160
    losses = []
    for step in range(10):
        for model in (ours, theirs):
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            losses.append(float(out.loss))
        for name, layer in lora_layers(ours).items():
            for key in ("lora_A", "lora_B"):
                mine, other = getattr(layer, key), named[f"base_model.model.{name}.{key}.default.weight"]
                assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-6), (step, name, key)
                with torch.no_grad():
                    mine -= 0.5 * mine.grad
                    other -= 0.5 * other.grad
                mine.grad = other.grad = None
    assert losses[0] != losses[-1]
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-5)


def test_a_layer_computes_what_its_dense_weight_does():
    torch.manual_seed(3)
    dense = nn.Linear(96, 40)
    layer = Nf4Linear(dense)
    assert isinstance(layer.bias, nn.Parameter)
    x, weight = torch.randn(5, 7, 96, requires_grad=True), layer.weight.detach()
    other = x.detach().clone().requires_grad_()
    bias = dense.bias.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    nn.functional.linear(other, weight, bias).square().sum().backward()
    assert torch.allclose(x.grad, other.grad, rtol=1e-6)
    assert torch.allclose(layer.bias.grad, bias.grad, rtol=1e-6)
    assert (weight - dense.weight).abs().max() < 0.2 * dense.weight.abs().max()  # 16 levels, the widest 0.304 apart


def test_what_a_reader_rounds_is_what_was_trained_on():
    packed, dense = small(torch.bfloat16), small(torch.bfloat16).float()
    quantize_layers(packed, [])
    round_trip(dense, [], torch.bfloat16)
    for name, layer in quantized_layers(packed).items():
        assert torch.equal(layer.weight.float(), dense.get_submodule(name).weight)
