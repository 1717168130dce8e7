"""Where a prefix goes in: recomputation, Triton's attention, cached generation, and the models that are refused."""

from __future__ import annotations

import copy

import harness
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from tritune.kernels.dispatch import KERNELS, Choice
from tritune.kernels.install import install
from tritune.trainer.batch import rows_of
from tritune.trainer.config import TrainConfig
from tritune.trainer.config.choices import Activations
from tritune.trainer.errors import InputError
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.prefix import PrefixConfig
from tritune.trainer.methods.prefix_layers import prefixes
from tritune.trainer.methods.prompt import PromptConfig
from tritune.trainer.model.activations import checkpoint_activations
from tritune.trainer.model.scorer import TokenScorer

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(2))
PREFIX = PrefixConfig(num_virtual_tokens=4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(harness.save_small_llama(tmp_path_factory.mktemp("model"), 160))


def prefixed(pretrained, config=PREFIX, dtype=torch.float32, seed=0):
    model = copy.deepcopy(pretrained).to(dtype)
    assert apply_method(config, model, [], seed) is None
    return model


def losses_and_gradients(scorer):
    """Of two micro-batches before one backward: recomputation of the first comes after the second's forward."""
    losses = [scorer(rows_of(ids), "token_nll") for ids in (IDS, IDS[:, :11])]
    torch.cat(losses).sum().backward()
    return torch.cat(losses).detach(), [p.grad for p in scorer.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", [PREFIX, PromptConfig(num_virtual_tokens=4)], ids=["prefix", "prompt"])
@pytest.mark.parametrize("keeps", ["full", "selective"])
def test_recomputed_layers_see_the_same(pretrained, config, keeps):
    expected, gradients = losses_and_gradients(TokenScorer(prefixed(pretrained, config), None, 0, 8).train())
    scorer = TokenScorer(prefixed(pretrained, config), None, 0, 8).train()
    checkpoint_activations(scorer, TrainConfig(activation_checkpointing=Activations(keeps)), None)
    found, recomputed = losses_and_gradients(scorer)
    assert found.equal(expected)
    assert len(recomputed) == len(gradients) > 0
    assert all(a.equal(b) for a, b in zip(recomputed, gradients, strict=True))


def test_only_prefixes_train_and_their_first_values_are_the_seed_s(pretrained):
    model, same, other = (prefixed(pretrained, seed=seed) for seed in (5, 5, 6))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"key", "value"}
    ours, again, others = ([p for layer in prefixes(m) for p in layer.parameters()] for m in (model, same, other))
    assert all(a.equal(b) for a, b in zip(ours, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(ours, others, strict=True))
    assert len({p.sum().item() for p in ours}) == len(ours)
    assert float(torch.cat([p.flatten() for p in ours]).std()) == pytest.approx(1, abs=0.2)
    still = prefixed(pretrained, PrefixConfig(num_virtual_tokens=4, init_std=0))
    assert not any(p.any() for layer in prefixes(still) for p in layer.parameters())


def test_triton_s_attention_takes_the_prefix_in(pretrained):
    """The interpreter's error against float64 is at most twice PyTorch's own, and eight roundings."""
    exact = TokenScorer(prefixed(pretrained).double(), None, 0, 7)(rows_of(IDS), "token_nll")
    plain = TokenScorer(prefixed(pretrained), None, 0, 7)(rows_of(IDS), "token_nll")
    model = prefixed(pretrained)
    done = install(model, {kernel: Choice("triton", "asked for") for kernel in KERNELS})
    assert done.counts["rope"] == 2
    found = TokenScorer(model, None, 0, 7, fused_head=done.head)(rows_of(IDS), "token_nll")
    own, unit = float((plain - exact).abs().max()), 2.0**-23 * float(exact.abs().max())
    assert float((found - exact).abs().max()) <= 2 * own + 8 * unit


@torch.no_grad()
@pytest.mark.parametrize("config", [PREFIX, PromptConfig(num_virtual_tokens=4)], ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_says_what_the_whole_forward_says(config, family):
    """With a cache, and behind padding on the left; Mistral's window of 12 leaves the virtual tokens behind."""
    settings = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    window = {"sliding_window": 12} if family == "mistral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **window)).eval()
    config.attach(model, [], 0, ())
    ids, mask = torch.randint(1, 40, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    ids[0, :3], mask[0, :3] = 0, 0
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for row, start in ((0, 3), (1, 0)):
        whole = model(input_ids=said[row : row + 1, start:]).logits[0].argmax(-1)
        assert whole[9 - start : -1].equal(said[row, 10:]), row
    assert len(set(said[1, 10:].tolist())) > 1


def test_models_that_no_prefix_goes_into_are_refused(pretrained, tmp_path):
    seeing = AutoModelForImageTextToText.from_pretrained(harness.save_small_vlm(tmp_path / "vlm"))
    for config in (PREFIX, PromptConfig()):
        with pytest.raises(InputError, match=r"gemma3 takes in more than text.*Use method=lora"):
            config.attach(seeing, [], 0, ())
    model = copy.deepcopy(pretrained)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match=r"flash_attention_2.*sdpa, eager.*Use model.attention=sdpa"):
        PREFIX.attach(model, [], 0, ())
    model = copy.deepcopy(pretrained)
    model._supports_attention_backend = False
    with pytest.raises(InputError, match=r"method=prefix.*llama.*transformers lets others replace"):
        PREFIX.attach(model, [], 0, ())
    model = copy.deepcopy(pretrained)
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(InputError, match=r"looks its tokens up in every layer.*Use method=lora"):
        PromptConfig().attach(model, [], 0, ())
