"""Which parameters full training takes, that frozen ones cost nothing, and that patterns which could do nothing are refused."""

from __future__ import annotations

import harness
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.trainer.batch import rows_of
from tritune.trainer.config import OptimConfig, TrainConfig
from tritune.trainer.config.choices import Activations, Dtype, Form
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.identity import identity_in, identity_of
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.model.activations import checkpoint_activations
from tritune.trainer.model.load import narrow_frozen, widen_masters
from tritune.trainer.model.optim import make_optimizer, make_state
from tritune.trainer.model.scorer import TESTED_FAMILIES, TokenScorer

PARTS = [f"{kind}.weight" for kind in (
    "input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm", "self_attn.k_norm",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.q_proj", "self_attn.v_proj",
)]  # fmt: skip


def make(model_type="qwen3", tied=False, auto=AutoModelForCausalLM, **changes):
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied, "pad_token_id": 0,
        "initializer_range": 0.3, "head_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **settings, **changes))


def trained(model, heads=(), **keys) -> set[str]:
    apply_method(FullConfig(**keys), model, list(heads), 0)
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def layer(*numbers: int) -> set[str]:
    return {f"model.layers.{i}.{part}" for i in numbers for part in PARTS}


EVERYTHING = layer(0, 1, 2) | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, EVERYTHING),
    ({"freeze": ["embed_tokens"]}, EVERYTHING - {"model.embed_tokens.weight"}),
    ({"train": ["lm_head"]}, {"lm_head.weight"}),
    ({"train": ["embed_tokens.weight"]}, {"model.embed_tokens.weight"}),
    ({"train": ["layers.1", "norm.weight"]}, {"model.norm.weight"} | layer(1)),
    ({"train": ["model.layers.[02].mlp"]}, {n for n in layer(0, 2) if ".mlp." in n}),
    ({"train": ["model.layers.*"], "freeze": ["self_attn", "*norm"]}, {n for n in layer(0, 1, 2) if ".mlp." in n}),
    ({"last_layers": 0}, {"model.norm.weight", "lm_head.weight"}),
    ({"last_layers": 1}, {"model.norm.weight", "lm_head.weight"} | layer(2)),
    ({"last_layers": 3, "train": ["embed_tokens"]}, EVERYTHING),
    ({"last_layers": 1, "train": ["layers.0.mlp"], "freeze": ["lm_head", "layers.2.mlp"]},
     {"model.norm.weight"} | {n for n in layer(2) if ".mlp." not in n} | {n for n in layer(0) if ".mlp." in n}),
])  # fmt: skip
def test_what_trains(keys, expected):
    assert trained(make(), **keys) == expected


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_what_stands_behind_the_layers_is_what_runs_after_them(family):
    """The rule is one of kinds; the judge is the order in which modules with parameters run."""
    model = make(family)
    ran: list[str] = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(input_ids=torch.arange(6)[None])
    layers = "transformer.h." if family == "gpt2" else "model.layers."
    after = max(i for i, name in enumerate(ran) if name.startswith(layers)) + 1
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert trained(model, last_layers=0) == {n for n in names if n.rpartition(".")[0] in ran[after:]} != set()


@pytest.mark.parametrize(("keys", "trains"), [
    ({"freeze": ["lm_head"]}, False), ({"freeze": ["embed_tokens"]}, False), ({"train": ["lm_head", "norm"]}, True),
    ({"train": ["embed_tokens", "norm"], "freeze": ["lm_head"]}, False), ({"last_layers": 1}, False),
])  # fmt: skip
def test_one_tensor_under_two_names_has_one_answer_and_it_is_said(keys, trains):
    model = make(tied=True)
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    assert trained(model, **keys) & both == (both if trains else set())
    said = FullConfig(**keys).describe(model, ())
    how = "trains" if trains else "is frozen"
    assert said[-1] == f"model.embed_tokens.weight and lm_head.weight are one tensor, which {how} under all its names"


def test_what_is_frozen_is_said():
    model = make()
    assert FullConfig().describe(model, ()) == []
    trained(model, train=["layers.2", "lm_head"])
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert FullConfig().describe(model, ()) == [
        f"{count:,} parameters in 24 tensors are frozen, without gradients and optimizer state: model.embed_tokens, "
        "model.layers.0, model.layers.1, model.norm"
    ]


@pytest.mark.parametrize("keys", [{"freeze": ["*"]}, {"train": ["score"]}, {"train": ["norm"]}, {"last_layers": 0}])
def test_a_new_head_always_trains(keys):
    model = make(auto=AutoModelForSequenceClassification, num_labels=3)
    expected = (
        {"score.weight"}
        if keys != {"train": ["norm"]} and "last_layers" not in keys
        else {"score.weight", "model.norm.weight"}
    )
    assert trained(model, ["score"], **keys) == expected


@pytest.mark.parametrize(("keys", "heads", "said"), [
    ({"train": ["q_prj"]}, [], r"method.train=q_prj: the model has no parameter and no module of this name. It has down_proj, "
     "embed_tokens, gate_proj"),
    ({"freeze": ["layers.3"]}, [], "method.freeze=layers.3: the model has no parameter"),
    ({"last_layers": 4}, [], "method.last_layers=4: the model has 3 layers. Give at most 3"),
    ({"train": ["norm"], "freeze": ["model"]}, [], r"method.train=\['norm'\], method.last_layers=None, "
     r"method.freeze=\['model'\]: nothing is left that trains"),
    ({"freeze": ["lm_head"]}, ["lm_head"], "it is the new head, which is random until it trains: lm_head.weight. Take it out"),
])  # fmt: skip
def test_patterns_that_do_nothing_are_refused(keys, heads, said):
    with pytest.raises(InputError, match=said):
        trained(make(), heads, **keys)


def test_what_takes_no_part_in_the_loss_is_no_part():
    unused = {"model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(InputError, match="it takes no part in the loss of text alone"):
        apply_method(FullConfig(train=["layers.0.mlp.up_proj"]), make(), [], 0, unused)
    with pytest.raises(InputError, match="nothing is left that trains"):
        apply_method(FullConfig(train=["layers.0.mlp"], freeze=["gate_proj", "down_proj"]), make(), [], 0, unused)


@pytest.mark.parametrize("keeps", Activations)
def test_frozen_parts_cost_no_gradient_no_state_and_no_backward(keeps):
    model = make().train()
    checkpoint_activations(model, TrainConfig(activation_checkpointing=keeps), None)
    names = trained(model, last_layers=1, freeze=["layers.2.mlp"])
    needed: list[bool] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _module, _inputs, out: needed.append(out.requires_grad))
    optimizer = make_optimizer(OptimConfig(lr=1e-3), model)
    make_state(optimizer)
    scorer = TokenScorer(model, None, 0, 64)
    scorer(rows_of(torch.arange(8)[None]), "summed_nll").backward()
    assert needed == [False, False, True]  # what the frozen layers give needs no gradient: backward ends above them
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (parameter in optimizer.state) == (name in names), name


def test_frozen_parts_change_no_digit_of_the_other_gradients():
    """Against every parameter trained: what still trains has the same gradients."""
    gradients = []
    for keys in ({}, {"last_layers": 2, "freeze": ["q_proj"]}):
        model = make()
        names = trained(model, **keys)
        TokenScorer(model, None, 0, 64)(rows_of(torch.arange(8)[None]), "summed_nll").backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name in names:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=0, atol=0)
    assert {n for n, g in gradients[1].items() if g is not None} == names


def test_in_bfloat16_only_what_trains_has_masters():
    model = make()
    names = trained(model, train=["norm", "lm_head"])
    widen_masters(model)
    narrow_frozen(model, Dtype.bfloat16)
    assert {n for n, p in model.named_parameters() if p.dtype is torch.float32} == names
    narrow_frozen(model, Dtype.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_keys_of_the_configuration():
    with pytest.raises(ConfigFaults) as raised:
        load_config(["model=tiny", "method=full", "method.last_layers=-1"], training=False)
    assert raised.value.faults == [
        "method.last_layers=-1: it must be at least 0. Use 0 to train what stands behind the layers alone"
    ]
    part = load_config(["model=tiny", "method.train=[norm]"], training=False).method
    assert (part.keeps_weights, part.what_trains()) == (True, "part of the parameters")
    assert part.made_as(Form.full) == "Part of the parameters trained, from"
    assert (FullConfig().keeps_weights, FullConfig().what_trains()) == (False, "every parameter")


def test_a_run_of_before_these_keys_is_the_same_run():
    config = load_config(["model=tiny"], training=False)
    now = identity_of(config)
    assert now["method.last_layers"] is None
    old = {"seed": 0, "method": {"name": "full"}}
    assert {k: v for k, v in identity_in(old).items() if k.startswith("method")} == {
        k: v for k, v in now.items() if k.startswith("method")
    }


def test_a_pattern_without_a_match_ends_a_run_with_2(tiny, tmp_path, tritune):
    done = tritune(*tiny, "method.train=[attention_probs]", f"run.dir={tmp_path / 'run'}")
    assert done.code == 2
    assert "method.train=attention_probs: the model has no parameter and no module of this name. It has" in done.err
    assert "Traceback" not in done.err


def test_a_run_says_what_is_frozen_and_exports_the_whole_model(sft_file, tmp_path, tritune):
    base = harness.save_small_llama(tmp_path / "model", 160)
    done = tritune(
        f"model.path={base}", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=8", "train.max_steps=2",
        "optim.lr=1e-2", "backend.device=cpu", "report.enabled=false", "method.last_layers=1", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (
        "tensors are frozen, without gradients and optimizer state: model.embed_tokens, model.layers.0, lm_head"
        in done.err
    )
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (base, tmp_path / "run" / "export"))
    assert before.keys() == after.keys()
    changed = {n for n in before if not before[n].equal(after[n])}
    assert changed == {n for n in before if n.startswith("model.layers.1.") or n == "model.norm.weight"}
