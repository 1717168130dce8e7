"""`TokenScorer` against transformers' own forward, for the families that differ: caps, scales, biases, tied heads.

The scorer passes no attention mask, reads the decoder without the head and applies the head to chosen tokens; Hugging
Face's model is called as its users call it: right-padded rows with an attention mask.
"""

from __future__ import annotations

import dataclasses

import harness
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.trainer.config import ModelConfig
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import InputError
from tritune.trainer.model.load import load_model
from tritune.trainer.model.scorer import KeepFloat64, TokenScorer, require_same_logits
from tritune.trainer.model.tokenizer import byte_tokenizer

VOCAB, PAD, CLASSES = 61, 60, 5
LENGTHS = (9, 1, 14, 2, 6)

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": PAD, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": False, "head_dim": None},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "final_logit_softcapping": 3.0},
    "phi3": {"tie_word_embeddings": False, "head_dim": None, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "head_dim": None},
    "cohere": {"logit_scale": 0.25, "head_dim": None},
    "olmo2": {"head_dim": None},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "phi": {"head_dim": None, "num_key_value_heads": 4, "partial_rotary_factor": 1.0},  # its head has a bias
}  # fmt: skip
# These do to their logits what none of the above does: a scorer that ignores it trains on a wrong loss in silence.
OTHER_HEADS: dict[str, dict] = {
    "hyperclovax": {"logits_scaling": 4.0, "head_dim": None},  # multiplies by what Granite divides by
    "recurrent_gemma": {"logits_soft_cap": 3.0, "attention_window_size": 4, "lru_width": 24, "head_dim": 6},
    "modernbert-decoder": {"tie_word_embeddings": True, "head_dim": None, "num_key_value_heads": None},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6},
}  # fmt: skip


def config_of(family: str):
    settings = {k: v for k, v in {**COMMON, **{**FAMILIES, **OTHER_HEADS}[family]}.items() if v is not None}
    if family == "gpt2":
        settings = {k: settings[k] for k in settings if k not in ("hidden_size", "intermediate_size", "head_dim")}
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            settings.pop(name, None)
    return AutoConfig.for_model(family, **settings)


def attention_of(family: str, wanted: str = "sdpa") -> str:
    return "eager" if family == "gemma2" else wanted  # transformers has no SDPA with Gemma 2's capped scores


def build(family: str, auto=AutoModelForCausalLM, dtype=torch.float32, **changes):
    """A model with random weights, biases and norms included: nothing that a mistake could hide behind is 0 or 1."""
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=dtype, attn_implementation=attention_of(family)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(lengths=LENGTHS, labels=True) -> Examples:
    """Ragged rows without the padding token, about half of their tokens supervised."""
    rng = np.random.default_rng(5)
    examples = harness.Rows()
    for i, n in enumerate(lengths):
        examples.add(rng.integers(3, PAD, n), rng.random(n) < 0.6, f"row {i}", label=i % CLASSES if labels else -1)
    return examples.freeze()


def hf_logits(model, batch):
    mask = (torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]).long()
    assert mask.sum() < mask.numel(), "no padding, no proof"
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits


def hf_nll(model, batch):
    logits = hf_logits(model, batch)
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).flatten(0, 1)
    return -logprobs[batch.predict, batch.targets]


def assert_as_good_as(ours, theirs, exact):
    """Our float32 error is at most twice the reference's own, both against float64, in the largest element; where the
    reference happens to be exact, a few units in the last place are left for the sums done in another order."""
    own = (theirs.double() - exact).abs().max()
    unit = exact.abs().max() * 2.0**-23
    assert (ours.double() - exact).abs().max() <= 2 * own + 8 * unit
    assert own <= 1e-3 * exact.abs().max(), "the judge itself is off: the bound above would say nothing"


def test_rows_are_what_the_tests_think():
    batch = collate(rows(), range(5), PAD)
    assert batch.input_ids.shape == (5, 14)
    assert 5 < len(batch.predict) < sum(LENGTHS) - 5
    assert not any(PAD in batch.input_ids[b, :n] for b, n in enumerate(LENGTHS))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(family):
    batch = collate(rows(), range(5), PAD)
    small, large = build(family), build(family, dtype=torch.float64)
    large.load_state_dict({k: v.double() for k, v in small.state_dict().items()})
    with KeepFloat64():
        exact_nll, exact_logits = hf_nll(large, batch), hf_logits(large, batch)
    last = (torch.arange(5), batch.lengths - 1)
    assert exact_nll.std() > 0.1
    for chunk in (3, 4096):
        scorer = TokenScorer(small, None, 0, chunk).eval()
        with torch.no_grad():
            nll, logits = scorer(batch, "token_nll"), scorer(batch, "last_logits")
        assert nll.dtype == logits.dtype == torch.float32
        assert_as_good_as(nll, hf_nll(small, batch), exact_nll)
        assert_as_good_as(logits, hf_logits(small, batch)[last], exact_logits[last])
    # and in float64, where nothing is left to rounding: sums of at most 61 terms in another order
    with torch.no_grad():
        scorer = TokenScorer(large, None, 0, 4096).eval()
        torch.testing.assert_close(scorer(batch, "token_nll"), exact_nll, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scorer(batch, "last_logits"), exact_logits[last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", OTHER_HEADS)
def test_families_with_other_heads_are_scored_right_or_refused(family):
    """Whatever stands between `lm_head` and the logits in transformers' forward: compute it, or say that we do not."""
    batch = collate(rows(), range(5), PAD)
    try:
        settings = ModelConfig(config=config_of(family).to_dict(), tokenizer="bytes")
        model = load_model(
            ModelConfig(config=settings, tokenizer="bytes"), config_of(family), byte_tokenizer(), None, 0
        )
        scorer = TokenScorer(model, None, 0, 4096).eval()
        require_same_logits(scorer)
        with torch.no_grad():
            nll = scorer(batch, "token_nll")
    except InputError:
        return
    expected = hf_nll(model.eval(), batch)
    # float32 through two layers and a head: a rounding of 1e-7 grows a hundredfold at most; a forgotten factor is of
    # order 1
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def has_score(family: str) -> bool:
    try:
        torch.manual_seed(0)
        return hasattr(AutoModelForSequenceClassification.from_config(config_of(family)), "score")
    except ValueError:  # transformers has no classifier of this family
        return False


CLASSIFIERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "gpt2", "phi", "olmo2"]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_class_logits_equal_transformers(family):
    assert has_score(family)
    batch = collate(rows(), range(5), PAD)
    auto = AutoModelForSequenceClassification
    small = build(family, auto, num_labels=CLASSES)
    large = build(family, auto, torch.float64, num_labels=CLASSES)
    large.load_state_dict({k: v.double() for k, v in small.state_dict().items()})
    assert small.score.out_features == CLASSES
    with KeepFloat64():
        exact = hf_logits(large, batch)
    assert exact.shape == (5, CLASSES)
    assert exact.std() > 0.1
    with torch.no_grad():
        ours = TokenScorer(small, None, 0, 7).eval()(batch, "class_logits")
        assert_as_good_as(ours, hf_logits(small, batch), exact)
        wide = TokenScorer(large, None, 0, 7).eval()(batch, "class_logits")
    torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-12)


def test_families_without_a_score_head_are_known():
    """If transformers gives one of these a classifier, it belongs into the list above."""
    assert [f for f in FAMILIES if f not in CLASSIFIERS and has_score(f)] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_ragged_batch_is_the_sum_of_its_rows_in_float64(family, attention):
    attention = attention_of(family, attention)
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention)
    scorer = TokenScorer(model, None, 0, 7).eval()
    examples = rows()
    with torch.no_grad():
        together = scorer(collate(examples, range(5), PAD), "token_nll")
        alone = [scorer(collate(examples, [i], PAD), "token_nll") for i in range(5)]
        paired = [scorer(collate(examples, pair, PAD), "token_nll").sum() for pair in ([4, 1], [3, 2, 0])]
    assert together.dtype == torch.float64
    total = together.sum().item()
    assert total > 1
    # Differences come from the order of sums alone: about a hundred operations of 1.1e-16 each on the way, of which
    # errors of both signs cancel over the tokens. float32 anywhere inside would show as 1e-8.
    assert sum(x.sum().item() for x in alone) == pytest.approx(total, rel=1e-13)
    assert sum(x.item() for x in paired) == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_gradients_of_a_ragged_batch_are_the_sum_of_its_rows_in_float64(family):
    torch.manual_seed(0)
    attention = attention_of(family)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float64, attn_implementation=attention)
    scorer = TokenScorer(model, None, 0, 7).eval()
    examples = rows()
    scorer(collate(examples, range(5), PAD), "token_nll").sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for i in range(5):
        scorer(collate(examples, [i], PAD), "token_nll").sum().backward()
    scale = max(g.abs().max().item() for g in together.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float64
        # a gradient sums over tokens and is large against its rounding somewhere: absolute, by the largest of all
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-10, atol=1e-13 * scale, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_chunks_change_no_gradient(family):
    torch.manual_seed(0)
    attention = attention_of(family)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float64, attn_implementation=attention)
    batch, grads = collate(rows(), range(5), PAD), []
    for chunk in (1, 5, 4096):
        model.zero_grad()
        TokenScorer(model, None, 0, chunk).eval()(batch, "token_nll").sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    scale = max(g.abs().max().item() for g in grads[0].values())
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-10, atol=1e-13 * scale, msg=name)


def test_an_empty_micro_batch_has_zero_loss_and_zero_gradients():
    """Ranks that have nothing to do run the same collectives: every parameter gets a gradient, of zero."""
    model = build("llama")
    scorer = TokenScorer(model, None, 0, 4).train()
    nll = scorer(collate(rows(), [], PAD), "token_nll")
    assert nll.shape == (0,)
    nll.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_what_stands_in_the_padding_changes_nothing():
    batch = collate(rows(), range(5), PAD)
    noise = torch.randint(VOCAB, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    real = torch.arange(14)[None] < batch.lengths[:, None]
    other = dataclasses.replace(batch, input_ids=torch.where(real, batch.input_ids, noise))
    scorer = TokenScorer(build("llama"), None, 0, 4096).eval()
    with torch.no_grad():
        for want in ("token_nll", "last_logits"):
            assert torch.equal(scorer(batch, want), scorer(other, want)), "the same computation, bit for bit"


def test_float64_mode_lets_other_casts_pass():
    x, y = torch.ones(2, dtype=torch.float64), torch.ones(2)
    with KeepFloat64():
        assert x.float().dtype == torch.float64
        assert x.to(torch.float32).dtype == torch.float64
        assert x.to(dtype=torch.float32).dtype == torch.float64
        assert x.to("cpu", torch.float32).dtype == torch.float64
        assert torch.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        assert x.long().dtype == torch.int64
        assert y.float().dtype == torch.float32
        assert y.double().dtype == torch.float64
        assert y.to(torch.int64).float().dtype == torch.float32
    assert x.float().dtype == torch.float32, "outside, nothing has changed"
