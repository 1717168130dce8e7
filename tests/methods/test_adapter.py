"""Bottleneck adapters against their formula in plain torch, where they stand, how they start, and exported and opened again."""

from __future__ import annotations

import json
from contextlib import nullcontext

import harness
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.launch.cli import main as cli
from tritune.trainer.__main__ import main
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.config.compose import load_config
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.methods.adapter import Activation, AdapterConfig, Placement
from tritune.trainer.methods.adapter_layers import AdaptedBlock, block_names
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.states import as_it_is
from tritune.trainer.model.scorer import KeepFloat64, TokenScorer
from tritune.trainer.open import open_model
from tritune.trainer.parallel.distributed import start

IDS = torch.randint(5, 40, (3, 11), generator=torch.Generator().manual_seed(3))
BLOCKS = {"gpt2": "transformer.h.{}.{}", "llama": "model.layers.{}.{}", "mixtral": "model.layers.{}.{}"}
ATTENTION = {"gpt2": "attn", "llama": "self_attn", "mixtral": "self_attn"}
FORMULAS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
}


def make(model_type="llama", dtype=torch.float32, auto=AutoModelForCausalLM, **changes):
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
        "num_local_experts": 3, "num_experts_per_tok": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    eager = (
        {"experts_implementation": "eager"} if model_type == "mixtral" else {}
    )  # torch's product of groups takes no float64
    return auto.from_config(AutoConfig.for_model(model_type, **settings, **changes), dtype=dtype, **eager)


def adapted(model, seed=0, **keys):
    keys = {"size": 5, **keys}
    config = AdapterConfig(**keys)
    apply_method(config, model, ["score"] if hasattr(model, "score") else [], seed)
    return config


def trained(model, seed=5):
    """Give every bottleneck values, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def written_out(model, config, weights, blocks):
    """The formula, hooked into an untouched model: h = f(x) in series and h = x in parallel,
    f(x) + scale * (W_up act(W_down h + b_down) + b_up)."""

    def add(name):
        def hook(_module, args, kwargs, output):
            first = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else kwargs["hidden_states"]
            h = x if config.placement == "parallel" else first
            down, b_down, up, b_up = (
                weights[f"{name}.adapter_{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
            )
            z = FORMULAS[config.activation](torch.einsum("btk,rk->btr", h, down) + b_down)
            total = first + config.scale * (torch.einsum("btr,nr->btn", z, up) + b_up)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        return hook

    for name in blocks:
        model.get_submodule(name).register_forward_hook(add(name), with_kwargs=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("family", "placement", "activation", "where", "scale"), [
    ("llama", "serial", "relu", ["attention", "mlp"], 1.0), ("llama", "parallel", "silu", ["attention", "mlp"], 4.0),
    ("llama", "parallel", "gelu", ["mlp"], 1.0), ("gpt2", "serial", "gelu", ["attention", "mlp"], 0.5),
    ("gpt2", "parallel", "tanh", ["attention", "mlp"], 1.0), ("mixtral", "parallel", "relu", ["mlp"], 2.0),
    ("llama", "serial", "tanh", ["layers.1.mlp", "*.0.self_attn"], 1.0),
])  # fmt: skip
def test_logits_and_gradients_are_those_of_the_formula(family, placement, activation, where, scale, dtype):
    model, plain = make(family, dtype), make(family, dtype)
    config = adapted(model, placement=Placement(placement), activation=Activation(activation), where=where, scale=scale)
    trained(model)
    names = {"attention": [ATTENTION[family]], "mlp": ["mlp"]}
    blocks = {BLOCKS[family].format(i, n) for place in where if place in names for i in (0, 1) for n in names[place]}
    blocks |= {"model.layers.1.mlp", "model.layers.0.self_attn"} if len(where[0]) > 9 else set()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {
        f"{b}.adapter_{p}.{k}" for b in blocks for p in ("down", "up") for k in ("weight", "bias")
    }
    weights = {n: p.detach().clone().requires_grad_() for n, p in trainable.items()}
    plain.requires_grad_(False)
    with KeepFloat64() if dtype is torch.float64 else nullcontext():
        untouched = plain(input_ids=IDS).logits
        expected = written_out(plain, config, weights, blocks)(input_ids=IDS).logits
        found = model(input_ids=IDS).logits
    assert (expected - untouched).abs().max() > 0.1
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **tolerance)
    for logits in (found, expected):
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, parameter in trainable.items():
        assert weights[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, **tolerance)


def test_a_model_starts_as_its_base_and_by_the_seed_alone():
    base = make()(input_ids=IDS).logits
    models = [make() for _ in range(3)]
    for model, (seed, where) in zip(models, [(0, ["mlp"]), (0, ["mlp", "attention"]), (1, ["mlp"])], strict=True):
        adapted(model, seed, where=where)
        assert torch.equal(model(input_ids=IDS).logits, base)
    first, more, other = (dict(m.named_parameters()) for m in models)
    downs = [n for n in first if n.endswith("mlp.adapter_down.weight")]
    assert len(downs) == 2
    for name in downs:  # other layers move none of its values, and each has its own
        assert first[name].equal(more[name])
        assert not first[name].equal(other[name])
        assert 0.5 / 4 < first[name].abs().max() <= 1 / 4  # uniform up to 1 / sqrt(16)
    assert not first[downs[0]].equal(first[downs[1]])


def test_a_new_head_trains_and_is_part_of_the_adapter():
    model = make(auto=AutoModelForSequenceClassification, num_labels=3)
    config = adapted(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == set(config.adapter_tensors(model, ["score"], as_it_is)) > {"score.weight"}


@pytest.mark.parametrize(("where", "said"), [
    (["ffn"], r"method.where=ffn: 2 of 2 decoder layers have no block of this name. Name others of their blocks: "
     "input_layernorm, mlp, post_attention_layernorm, self_attn"),
    (["q_proj"], "method.where=q_proj: 2 of 2 decoder layers have no block"),
    (["mlp", "layers.2.mlp"], "method.where=layers.2.mlp: "),
])  # fmt: skip
def test_a_place_that_is_not_there_is_refused(where, said):
    with pytest.raises(InputError, match=said):
        adapted(make(), where=where)


def test_blocks_that_take_no_part_get_none():
    model = make()
    idle = {n for n, _ in model.named_parameters() if n.startswith("model.layers.0.mlp.")}
    assert block_names(AdapterConfig(), model, idle) == ["model.layers.1.mlp"]
    with pytest.raises(InputError, match=r"take no part in the loss of text alone: model.layers.0.mlp"):
        block_names(AdapterConfig(where=["layers.0.mlp"]), model, idle)


def test_what_was_put_in_is_said():
    model = make()
    config = adapted(model, where=["attention", "layers.1.mlp"])
    assert config.describe(model, ()) == ["bottlenecks on 2 x self_attn, 1 x mlp"]


@pytest.mark.parametrize("placement", Placement)
def test_dropout_does_not_see_how_rows_are_split(placement):
    """In float64, so that equal means to 1e-12: whole, alone, in another order."""
    model = make(dtype=torch.float64)
    config = AdapterConfig(size=8, dropout=0.4, placement=placement, where=["attention", "mlp"])
    keys = apply_method(config, model, [], 0)
    rows, g = harness.Rows(), torch.Generator().manual_seed(4)
    for i, n in enumerate((7, 3, 11, 5)):
        rows.add(torch.randint(1, 40, (n,), generator=g).tolist(), [True] * n, f"row {i}")
    scorer, data = TokenScorer(trained(model), keys, 9, 64).train(), rows.freeze()

    def nll(groups, step=3):
        found = {}
        for group in groups:
            parts = scorer(collate(data, group, 0, step), "token_nll").split([int(data.lengths[r]) - 1 for r in group])
            found |= dict(zip(group, parts, strict=True))
        return torch.cat([found[r] for r in range(4)])

    whole = nll([[0, 1, 2, 3]])
    for groups in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        torch.testing.assert_close(nll(groups), whole, rtol=1e-12, atol=1e-12)
    assert ((nll([[0, 1, 2, 3]], step=4) - whole).abs() > 1e-6).any()
    with torch.no_grad():
        scorer.eval()
        assert torch.equal(nll([[0, 1, 2, 3]]), nll([[0, 1, 2, 3]], step=4))


def test_dropout_keeps_the_mean():
    """Half of the activations are dropped and the others doubled: the mean over masks is what is added without dropout."""
    from tritune.kernels.dropout import token_keys
    from tritune.trainer.methods.token_keys import TokenKeys

    keys = TokenKeys()
    keys.set(token_keys(0, 1, torch.arange(4000), 1))
    block = AdaptedBlock(torch.nn.Linear(6, 4, dtype=torch.float64), AdapterConfig(size=5, dropout=0.5), 4, 4, 7, keys)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        x = torch.randn(6, dtype=torch.float64, generator=g)
        draws, exact = block.train()(x.expand(4000, 1, 6))[:, 0], block.eval()(x)
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)).max() < 6


@pytest.mark.parametrize(("words", "said"), [
    (["method.size=0"], "method.size=0: it must be at least 1. Common values are 16 to 256"),
    (["method.where=[]"], "method.where=[]: no block is named."),
    (["method.scale=0"], "method.scale=0.0: what a bottleneck adds is scaled by it."),
    (["method.dropout=1"], "method.dropout=1.0: it must be at least 0 and below 1."),
    (["method.placement=before"], "method.placement=before: "),
    (["model.path=x", "model.config={}", "export.form=merged"], "export.form=merged: what method=adapter trains is no "
     "change of the base's weights and cannot be merged into them. Use adapter"),
    (["model.path=x", "model.config={}", "export.form=full"], "export.form=full: method=adapter trains an adapter: adapter"),
    (["export.enabled=true"], "export.enabled=True: method=adapter is written beside its base, and one with random "
     "weights is nowhere to be loaded. Give model.path, or export.enabled=false"),
])  # fmt: skip
def test_wrong_values(words, said):
    with pytest.raises(ConfigFaults) as raised:
        load_config(["model=tiny", "method=adapter", "export.enabled=false", *words], training=False)
    assert any(fault.startswith(said) for fault in raised.value.faults), raised.value.faults


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sft_file):
    """A run with an export: overrides of its own, its directory, its base, and what it printed of the export."""
    root = tmp_path_factory.mktemp("adapter")
    base = harness.save_small_llama(root / "model", 160)
    words = [
        f"model.path={base}", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=8", "train.max_steps=3",
        "optim.lr=2e-2", "backend.device=cpu", "report.enabled=false", "evaluation.samples=0", "method=adapter",
        "method.size=6", "method.where=[attention,mlp]", "method.placement=parallel", "method.scale=2",
    ]  # fmt: skip
    with harness.keeping_signals():
        assert main([*words, f"run.dir={root / 'run'}"]) == 0
    return root / "run", base


def read(*overrides: str, run=None):
    kept = yaml.safe_load((run / "config.yaml").read_text()) if run else None
    config = load_config([*overrides, *([f"run.dir={run}"] if run else [])], kept=kept, training=False)
    return open_model(config, run, start(BackendConfig(), False)).model


def test_an_export_is_opened_again_with_the_same_logits(exported, capfd):
    run, base = exported
    facts = json.loads((run / "summary.json").read_text())["export"]
    assert (facts["form"], facts["reader"].split()[0]) == ("adapter", "Tritune")
    assert facts["max_difference"] <= facts["allowed"]
    assert not (run / "export" / "adapter_config.json").exists()  # PEFT would take the folder for one of its own
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tritune\n")
    assert "PEFT has no such method" in card
    assert "| bottleneck | 6, parallel, relu, scale 2.0 |" in card
    with torch.no_grad():
        ran, opened, plain = (m.eval()(input_ids=IDS).logits for m in (
            read(run=run), read(f"model.path={run / 'export'}"), AutoModelForCausalLM.from_pretrained(base)))  # fmt: skip
    assert torch.equal(opened, ran)
    assert float((ran - plain).abs().max()) > 0.05
    said = []
    for words in (
        ["model.path=" + str(run / "export")],
        [f"model.path={base}", f"model.adapter={run / 'export'}"],
        [f"run.dir={run}"],
    ):
        assert (
            cli(["generate", *words, "--prompt", "0: the cat", "generate.max_new_tokens=6", "backend.device=cpu"]) == 0
        )
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] == said[2]


def test_every_parameter_does_not_go_on_from_an_adapter_of_ours(exported, tiny, tritune, tmp_path):
    run, _ = exported
    words = [w for w in tiny if not w.startswith("model")]
    done = tritune(*words, f"model.path={run / 'export'}", f"run.dir={tmp_path / 'run'}")
    assert done.code == 2
    assert "its adapter is of method=adapter, and method=full would train. Give method=adapter\n" in done.err


@pytest.mark.parametrize(("change", "said"), [
    ({"layout": 2}, "its tritune_adapter.json says 2, and layout 1 is read here"),
    ({"more": 1}, "its tritune_adapter.json says more, and layout 1"),
    ({"method": "lora"}, "it is an adapter of method=lora, which is not known here"),
    ({"method": ["adapter"]}, "which is not known here"),
    ({"keys": {"size": "many"}}, "its keys cannot be read"),
    ({"keys": {"width": 6}}, "its keys cannot be read"),
    ({"keys": {"size": -1}}, "says what no adapter is, method.size: it must be at least 1"),
    ({"keys": {"size": 10**12, "where": ["mlp"]}}, "do not fit its base: model.layers.0.mlp.adapter_down.bias is [6] there, "
     "and [1000000000000] expected"),
    ({"keys": {"size": 10**30}}, "it does not fit its base ("),
    ({"keys": {"size": 6, "where": ["mlp"]}}, "do not fit its base: model.layers.0.self_attn.adapter_down.bias is [6] there, "
     "and not expected"),
    ({"keys": {"size": 6, "where": ["ffn"]}}, "it does not fit its base: method.where=ffn: 2 of 2 decoder layers have no"),
    ({"heads": ["score"]}, "it does not fit its base: heads=score: the base has no such module"),
    ({"heads": "score"}, "has no list of heads"),
    ({"revision": 5}, "has revision=5, which is no text"),
])  # fmt: skip
def test_settings_that_no_adapter_has_are_refused(exported, tmp_path, change, said):
    run, _ = exported
    folder = tmp_path / "export"
    folder.mkdir()
    for file in (run / "export").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "tritune_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as raised:
        read(f"model.path={folder}")
    assert raised.value.value == f"model.path={folder}"
    assert said in raised.value.rule
    assert raised.value.remedy


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: w.pop(min(w)), "is not there, and [6] expected"),
    (lambda w: w.update(more=torch.ones(2)), "more is [2] there, and not expected"),
    (lambda w: w[min(w)].fill_(float("nan")), "holds NaN or Inf"),
])  # fmt: skip
def test_a_file_of_other_tensors_is_refused(exported, tmp_path, change, said):
    run, _ = exported
    for file in (run / "export").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as raised:
        read(f"model.path={tmp_path}")
    assert said in raised.value.rule


def test_two_adapters_in_one_folder_are_refused(exported, tmp_path):
    run, _ = exported
    for file in (run / "export").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="it holds two adapters"):
        read(f"model.path={tmp_path}")
