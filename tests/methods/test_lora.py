"""Which layers LoRA takes, what trains then, how it starts, and that its dropout does not see how rows are split."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.kernels.dropout import token_keys
from tritune.trainer.config.choices import Bias
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import InputError
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import LoRALinear, lora_layers, reset
from tritune.trainer.methods.token_keys import TokenKeys
from tritune.trainer.model.load import count_parameters, is_tied
from tritune.trainer.model.scorer import TokenScorer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def make(model_type="qwen2", tied=False, auto=AutoModelForCausalLM, dtype=torch.float32, **changes):
    """Qwen 2 by default: biases on q, k, v and nowhere else."""
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **settings, **changes), dtype=dtype)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"rank": 2, "alpha": 6.0, **settings})


def names(layers: list[int], attention=(), mlp=()) -> set[str]:
    return {f"model.layers.{i}.self_attn.{n}" for i in layers for n in attention} | {
        f"model.layers.{i}.mlp.{n}" for i in layers for n in mlp
    }


def adapted(model) -> set[str]:
    return set(lora_layers(model))


def trainable(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def factors(layers: set[str]) -> set[str]:
    return {f"{n}.{f}" for n in layers for f in ("lora_A", "lora_B")}


def examples(lengths=(7, 3, 11, 5)) -> Examples:
    g = torch.Generator().manual_seed(4)
    result = harness.Rows()
    for i, n in enumerate(lengths):
        result.add(torch.randint(1, 40, (n,), generator=g).tolist(), [True] * n, f"row {i}", label=i % 2)
    return result.freeze()


def trained(model, seed=5):
    """Give every B a value, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g, dtype=torch.float64))
    return model


ALL = names([0, 1, 2], ATTENTION, MLP)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["all-linear"], [], ALL),
        (["q_proj"], [], names([0, 1, 2], ["q_proj"])),
        (["q_proj", "v_proj"], [], names([0, 1, 2], ["q_proj", "v_proj"])),
        (["mlp.up_proj"], [], names([0, 1, 2], [], ["up_proj"])),
        (["model.layers.1.self_attn.q_proj"], [], names([1], ["q_proj"])),
        (["model.layers.[02].*"], [], names([0, 2], ATTENTION, MLP)),
        (["*.self_attn.*"], [], names([0, 1, 2], ATTENTION)),
        (["*_proj"], ["mlp.*", "*.mlp.*"], names([0, 1, 2], ATTENTION)),
        (["all-linear"], ["down_proj", "*layers.0*"], names([1, 2], ATTENTION, ["gate_proj", "up_proj"])),
        (["all-linear", "lm_head"], ["model.*"], {"lm_head"}),
        (["all-linear", "lm_head"], [], ALL | {"lm_head"}),
        (["layers.1.mlp.up_proj", "o_proj"], [], names([1], [], ["up_proj"]) | names([0, 1, 2], ["o_proj"])),
    ],
)
def test_patterns(targets, exclude, expected):
    model = make()
    apply_method(lora(targets=targets, exclude=exclude), model, [], 0)
    assert adapted(model) == expected
    assert trainable(model) == factors(expected)


@pytest.mark.parametrize(
    "pattern", ["proj", "query", "Q_PROJ", "embed_tokens", "norm", "layers.9.*", "q_proj.weight", "1.q_proj"]
)
def test_a_target_that_matches_nothing_is_refused(pattern):
    """Also a part of a name ("proj") and modules that are not linear: names match whole, from a dot on."""
    with pytest.raises(InputError, match=r"method\.targets") as error:
        apply_method(lora(targets=["q_proj", pattern]), make(), [], 0)
    assert "o_proj" in error.value.remedy, "the remedy names what there is"


def test_excluding_everything_is_refused():
    with pytest.raises(InputError, match=r"method\.exclude"):
        apply_method(lora(targets=["q_proj"], exclude=["*"]), make(), [], 0)


def test_a_conv1d_is_a_linear_layer():
    """GPT-2's layers; `all-linear` takes each of them."""
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    apply_method(lora(), model, [], 0)
    assert adapted(model) == {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "c_attn.lora" in n}
    assert set(shapes.values()) == {(2, 16), (48, 2)}


def test_a_model_without_linear_layers_is_refused():
    model = make()
    model.model.layers, model.lm_head = nn.ModuleList(), nn.Identity()
    with pytest.raises(InputError, match="no linear layer") as error:
        apply_method(lora(), model, [], 0)
    assert "method=full" in error.value.remedy


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_alone(tied):
    model = make(tied=tied)
    apply_method(lora(), model, [], 0)
    assert type(model.lm_head) is nn.Linear
    assert not model.lm_head.weight.requires_grad
    assert is_tied(model) == tied


def test_all_linear_leaves_a_new_classification_head_alone_and_trains_it_whole():
    model = make(auto=AutoModelForSequenceClassification, num_labels=3)
    apply_method(lora(), model, ["score"], 0)
    assert type(model.score) is nn.Linear
    assert adapted(model) == ALL
    assert trainable(model) == factors(ALL) | {"score.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_as_a_target(tied):
    """Whatever asks the model about its head still gets an answer, as `build` does right after."""
    model = make(tied=tied)
    apply_method(lora(targets=["lm_head"]), model, [], 0)
    assert isinstance(model.get_output_embeddings(), LoRALinear)
    assert is_tied(model) == tied


def test_biases():
    q, qkv = names([0, 1, 2], ["q_proj"]), names([0, 1, 2], ["q_proj", "k_proj", "v_proj"])
    for bias, expected in [
        (Bias.none, set()),
        (Bias.lora_only, {f"{n}.base_layer.bias" for n in q}),
        (Bias.all, {f"{n}.base_layer.bias" for n in q} | {f"{n}.bias" for n in qkv - q}),
    ]:
        model = make()
        apply_method(lora(targets=["q_proj"], bias=bias), model, [], 0)
        assert trainable(model) == factors(q) | expected, bias


def test_lora_only_bias_on_layers_without_any():
    model = make()
    apply_method(lora(targets=["o_proj"], bias=Bias.lora_only), model, [], 0)
    assert trainable(model) == factors(names([0, 1, 2], ["o_proj"]))


def test_modules_to_save():
    q = names([0, 1, 2], ["q_proj"])
    model = make()
    apply_method(
        lora(targets=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "*.post_attention_layernorm"]),
        model,
        [],
        0,
    )
    norms = {f"model.layers.{i}.post_attention_layernorm.weight" for i in range(3)}
    assert trainable(model) == factors(q) | {"lm_head.weight", "model.embed_tokens.weight"} | norms
    with pytest.raises(InputError, match=r"method\.modules_to_save"):
        apply_method(lora(modules_to_save=["nothing"]), make(), [], 0)
    with pytest.raises(InputError, match=r"method\.modules_to_save"):
        apply_method(lora(targets=["q_proj"], modules_to_save=["self_attn"]), make(), [], 0)


def test_full_trains_everything():
    model = make().requires_grad_(False)
    assert apply_method(FullConfig(), model, [], 0) is None
    assert all(p.requires_grad for p in model.parameters())


def test_parameter_counts():
    model = make(tied=True)
    before = count_parameters(model)[1]
    assert before == sum(p.numel() for p in set(model.parameters())), "a tied matrix counts once"
    apply_method(lora(rank=2, targets=["q_proj", "up_proj"]), model, [], 0)
    added = 3 * 2 * (16 + 16) + 3 * 2 * (16 + 24)
    assert count_parameters(model) == (added, before + added)


def test_only_the_right_parameters_move():
    model = make()
    keys = apply_method(
        lora(targets=["q_proj", "up_proj"], bias=Bias.lora_only, modules_to_save=["lm_head"]), trained(model), [], 0
    )
    assert keys is None, "no dropout, nobody needs keys"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    scorer, batch = TokenScorer(model, keys, 0, 4096).train(), collate(examples(), range(4), 0)
    for _ in range(2):  # in the first step B is zero, so A has no gradient
        optimizer.zero_grad()
        scorer(batch, "token_nll").mean().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable(model)
    assert len(moved) == 6 * 2 + 3 + 1


def test_the_update_starts_at_zero_and_a_is_not():
    batch, model = collate(examples(), range(4), 0), make(dtype=torch.float64)
    with torch.no_grad():
        base = TokenScorer(model, None, 0, 4096).eval()(batch, "token_nll")
        keys = apply_method(lora(targets=["all-linear", "lm_head"], dropout=0.5), model, [], 3)
        assert torch.equal(TokenScorer(model, keys, 0, 4096).train()(batch, "token_nll"), base)
    for layer in lora_layers(model).values():
        assert not layer.lora_B.any()
        bound = layer.lora_A.shape[1] ** -0.5
        assert bound / 2 < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.dtype == torch.float64


def test_a_starts_uniform():
    """Kaiming-uniform with a = sqrt(5), PEFT's and the paper's: U(-1/sqrt(K), 1/sqrt(K)), by its first two moments."""
    layer = LoRALinear(nn.Linear(64, 8), lora(rank=256), "layer", None)
    reset(layer, 1)
    n, bound = layer.lora_A.numel(), 64**-0.5
    unit = (layer.lora_A.double() / bound).flatten()
    assert abs(unit.mean()) < 6 * (1 / 3 / n) ** 0.5  # six sigma of a mean of n uniforms
    assert abs((unit**2).mean() - 1 / 3) < 6 * (4 / 45 / n) ** 0.5


def test_start_depends_on_seed_and_name_alone():
    def start(seed, **settings):
        model = make()
        torch.manual_seed(torch.randint(1000, ()).item())  # the global generator has no part in it
        apply_method(lora(**settings), model, [], seed)
        return {n: m.lora_A.detach().clone() for n, m in lora_layers(model).items()}

    every, few, other = start(1), start(1, targets=["v_proj"]), start(2)
    for name, a in few.items():
        assert torch.equal(a, every[name])
    values = list(every.values())
    assert not any(torch.equal(every[n], other[n]) for n in every)
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i] if a.shape == b.shape)


def test_scaling_is_alpha_over_rank():
    model = make(dtype=torch.float64)
    layer = model.model.layers[0].self_attn.q_proj
    apply_method(lora(rank=4, alpha=6.0, targets=["q_proj"]), model, [], 0)
    layer = trained(model).model.layers[0].self_attn.q_proj
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = layer.base_layer(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", [["all-linear"], ["lm_head"], ["all-linear", "lm_head"]])
@pytest.mark.parametrize("chunk", [3, 4096])
def test_dropout_does_not_see_how_rows_are_split(targets, chunk):
    """In float64, so that equal means to 1e-12: alone, reordered, padded wider, in chunks of the loss."""
    model = make(dtype=torch.float64)
    keys = apply_method(lora(dropout=0.4, targets=targets), model, [], 0)
    scorer, data = TokenScorer(trained(model), keys, 9, chunk).train(), examples()

    def grads_and_nll(groups, step=3, seed=9):
        scorer.seed = seed
        model.zero_grad()
        nll = {}
        for group in groups:
            out = scorer(collate(data, group, 0, step), "token_nll")
            out.sum().backward()
            for row, part in zip(group, out.detach().split([int(data.lengths[r]) - 1 for r in group]), strict=True):
                nll[row] = part
        return torch.cat([nll[r] for r in range(4)]), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    whole = grads_and_nll([[0, 1, 2, 3]])
    for groups in ([[0], [1], [2], [3]], [[3, 1], [2, 0]], [[2, 3, 1, 0]]):
        split = grads_and_nll(groups)
        torch.testing.assert_close(split[0], whole[0], rtol=1e-12, atol=1e-12)
        for one, other in zip(split[1], whole[1], strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item())
    for changed in (grads_and_nll([[0, 1, 2, 3]], step=4), grads_and_nll([[0, 1, 2, 3]], seed=10)):
        assert ((changed[0] - whole[0]).abs() > 1e-6).any(), "another step or seed is another mask"
    with torch.no_grad():
        scorer.eval()
        still = scorer(collate(data, [0, 1, 2, 3], 0, 3), "token_nll")
        assert torch.equal(still, scorer(collate(data, [0, 1, 2, 3], 0, 4), "token_nll"))
        assert ((still - whole[0]).abs() > 1e-6).any(), "evaluation drops nothing"


def test_mean_over_dropout_masks_is_the_undropped_update():
    """E[drop(x)] = x: the mean over 4,000 samples is within six standard errors in every output."""
    keys = TokenKeys()
    keys.set(token_keys(0, 1, torch.arange(4000), 1))
    layer = LoRALinear(nn.Linear(12, 3, dtype=torch.float64), lora(rank=2, dropout=0.3), "layer", keys)
    reset(layer, 0)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        draws = layer.train()(x.expand(4000, 1, 12))[:, 0]
        exact = layer.eval()(x)
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)).max() < 6
