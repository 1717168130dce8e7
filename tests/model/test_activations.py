"""Activation checkpointing keeps less and computes the same; compiling computes the same to rounding."""

from __future__ import annotations

import copy

import harness
import pytest
import today
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from tritune.trainer.batch import rows_of
from tritune.trainer.config import TrainConfig
from tritune.trainer.config.choices import Activations
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import add_lora
from tritune.trainer.model.activations import checkpoint_activations
from tritune.trainer.model.layers import compile_layers, decoder_layers
from tritune.trainer.model.scorer import TokenScorer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(harness.save_small_llama(tmp_path_factory.mktemp("model"), 160))


def scorer(pretrained, keeps="none", offload=False, compiled=False, dropout=0.3):
    """LoRA with dropout and with values in B, so that masks matter to gradients. Dropout inside the model, too."""
    model = copy.deepcopy(pretrained)
    model.config.attention_dropout = 0.1
    for layer in decoder_layers(model):
        layer.self_attn.attention_dropout = 0.1
    keys = add_lora(LoraConfig(rank=4, dropout=dropout, targets=["all-linear"]), model, [], seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1, generator=generator)
    made = TokenScorer(model, keys, seed=3, chunk_tokens=8).train()  # the head's chunks set keys of their own
    checkpoint_activations(
        made, TrainConfig(activation_checkpointing=Activations(keeps), activation_offload=offload), keys
    )
    if compiled:
        compile_layers(made)
    return made


def batch(num_positions, seed):
    ids = torch.randint(3, 250, (2, num_positions), generator=torch.Generator().manual_seed(seed))
    return rows_of(ids, step=1, first_sample=seed)


def loss_and_gradients(made):
    """Of two micro-batches, one after the other; and the bytes that forward kept for backward."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    losses = []
    for num_positions, seed in ((20, 1), (31, 2)):
        torch.manual_seed(seed)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses.append(made(batch(num_positions, seed), "token_nll").sum())
        losses[-1].backward()
    gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(("keeps", "offload"), [("full", False), ("full", True), ("selective", False)])
def test_the_same_bits(pretrained, keeps, offload):
    losses, gradients, _ = loss_and_gradients(scorer(pretrained))
    again, recomputed, _ = loss_and_gradients(scorer(pretrained, keeps, offload))
    assert again.equal(losses)
    assert set(recomputed) == set(gradients)
    for name, gradient in gradients.items():
        assert recomputed[name].equal(gradient), name


def test_forward_runs_again_and_keeps_less(pretrained):
    """Inputs only for `full`; inputs and products for `selective`. Non-reentrant checkpoints keep placeholders in hooks."""
    calls, kept = {}, {}
    for keeps in ("none", "selective", "full"):
        made = scorer(pretrained, keeps)
        counted = decoder_layers(made)[0].mlp.act_fn
        counted.register_forward_hook(lambda *_, keeps=keeps: calls.update({keeps: calls.get(keeps, 0) + 1}))
        kept[keeps] = loss_and_gradients(made)[2]
    assert calls == {"none": 2, "selective": 4, "full": 4}
    assert kept["full"] < 0.5 * kept["none"]
    assert kept["selective"] < 0.8 * kept["none"]


def test_names_stay(pretrained):
    plain, wrapped = scorer(pretrained), scorer(pretrained, "full")
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_no_wrapping_without_gradients(pretrained):
    made = scorer(pretrained, "full").eval()
    with torch.no_grad():
        assert made(batch(9, 1), "token_nll").shape == (16,)


@pytest.mark.slow
@pytest.mark.parametrize("keeps", today.some(["none", "full", "selective"], 3, "compiled"))
def test_compiled(pretrained, keeps):
    """float32 rounding: losses to 1e-5; gradients, sums of many terms that cancel, to 2e-4 of their
    largest. Masks of another draw would move them by tens of percent.

    Dropout inside the model draws from another stream in compiled code, and is off here.
    """
    eager, made = scorer(pretrained), scorer(pretrained, keeps, compiled=True)
    for model in (eager, made):
        for layer in decoder_layers(model):
            layer.self_attn.attention_dropout = 0.0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses, gradients, _ = loss_and_gradients(eager)
    compiled, others, _ = loss_and_gradients(made)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.numpy() == pytest.approx(losses.numpy(), rel=1e-5)
    for name, gradient in gradients.items():
        assert others[name].numpy() == pytest.approx(
            gradient.numpy(), rel=1e-3, abs=2e-4 * float(gradient.abs().max())
        ), name
