"""A model of meta tensors and where its values are, against the same model loaded whole."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.choices import Attention
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.model.load import CLASS_HEAD, is_tied, load_architecture, load_model, widen_masters
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.parallel.box import boxes_of_run

SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "llama-untied": {"tie_word_embeddings": False, "mlp_bias": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {"head_dim": None},
    "mistral": {},
    "olmo2": {"head_dim": None},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.fixture
def saved(request, tmp_path):
    """The family's model in two safetensors files with an index."""
    family = request.param
    settings = {k: v for k, v in {**SHAPE, **FAMILIES[family]}.items() if v is not None}
    if family == "gpt2":
        settings = dict(FAMILIES["gpt2"])
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(family.partition("-")[0], vocab_size=len(tokenizer), pad_token_id=0, **settings)
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def both(where, labels, dtype, method):
    """The model whole, the meta model with its weights, each with the method applied."""
    attention = Attention.eager if "gemma2" in str(where) else Attention.sdpa
    tokenizer, settings = byte_tokenizer(), ModelConfig(path=str(where), attention=attention)
    heads = [CLASS_HEAD] if labels else []
    models = []
    for load in (load_model, load_meta_model):
        loaded = load(settings, load_architecture(settings, len(tokenizer)), tokenizer, labels, 7, dtype)
        assert not isinstance(loaded, str), loaded
        model, weights = loaded if isinstance(loaded, tuple) else (loaded, None)
        apply_method(method, model, heads, seed=7)
        widen_masters(model)
        models.append(model)
    weights.take(model)
    return *models, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=3, modules_to_save=["norm"])], ids=["full", "lora"])
@pytest.mark.parametrize("saved", ["llama", "qwen3", "phi3"], indirect=True)
def test_every_value_is_found(saved, method, dtype):
    compare(*both(saved, None, dtype, method))


@pytest.mark.parametrize("saved", FAMILIES, indirect=True)
def test_every_family(saved):
    compare(*both(saved, None, torch.float32, FullConfig()))


@pytest.mark.parametrize("saved", ["llama-untied", "mistral"], indirect=True)
def test_a_new_head_starts_as_in_the_whole_model(saved):
    compare(*both(saved, ["a", "b", "c"], torch.float32, LoraConfig(rank=3)))


def compare(whole, meta, weights):
    expected, found = dict(whole.named_parameters()), dict(meta.named_parameters())
    assert list(found) == list(expected)
    rng = random.Random(1)
    for name, parameter in found.items():
        values = expected[name].detach().reshape(-1)
        assert parameter.device.type == "meta"
        assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype)
        assert parameter.requires_grad == expected[name].requires_grad
        for _ in range(3):  # any range, in the middle of a row or not
            start, stop = sorted(rng.sample(range(values.numel() + 1), 2))
            boxes = boxes_of_run(parameter.shape, start, stop)
            read = [weights.read(name, box).to(parameter.dtype).reshape(-1) for box in boxes]
            assert torch.cat([*read, values[:0]]).equal(values[start:stop]), (name, start, stop)
    if whole.get_output_embeddings() is not None:
        assert is_tied(meta) == is_tied(whole)
    for (name, one), (other, two) in zip(whole.named_buffers(), meta.named_buffers(), strict=True):
        assert name == other
        assert one.equal(two), name


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_what_must_be_loaded_whole(saved):
    tokenizer, settings = byte_tokenizer(), ModelConfig(path=str(saved))
    architecture = load_architecture(settings, len(tokenizer))
    architecture.vocab_size -= 3
    why = load_meta_model(settings, architecture, tokenizer, None, 0, torch.float32)
    assert why == "new embeddings are drawn from the whole matrix"
    architecture.vocab_size += 3
    architecture.num_hidden_layers = 3
    why = load_meta_model(settings, architecture, tokenizer, None, 0, torch.float32)
    assert why == "no tensor of its files is named model.layers.2.self_attn.q_proj.weight"
    made = ModelConfig(config={"model_type": "llama"}, tokenizer="bytes")
    assert (
        load_meta_model(made, architecture, tokenizer, None, 0, torch.float32)
        == "random weights are drawn in one order"
    )
