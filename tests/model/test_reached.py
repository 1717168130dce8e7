"""Which parameters take no part in the loss of text, judged by autograd itself, and what is left alone for it."""

from __future__ import annotations

import harness
import pytest
import torch
from test_scorer import CLASSES, CLASSIFIERS, FAMILIES, build, config_of
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.trainer.backends.fsdp import Fsdp
from tritune.trainer.batch import rows_of
from tritune.trainer.config import ModelConfig, OptimConfig
from tritune.trainer.config.backends import FsdpConfig
from tritune.trainer.config.choices import Bias, Dtype
from tritune.trainer.errors import InputError
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.model import reached
from tritune.trainer.model.layers import decoder_layers, idle_modules
from tritune.trainer.model.load import auto_class, load_architecture, load_model
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.optim import make_optimizer
from tritune.trainer.model.reached import describe_unused, find_unused, reaches_everything
from tritune.trainer.model.scorer import TESTED_FAMILIES, TokenScorer, require_same_logits
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.mesh import make_mesh

TOWER = ("model.vision_tower.", "model.multi_modal_projector.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeing")
    return {f: harness.save_small_vlm(root / f, f) for f in ("gemma3", "llava")}


@pytest.fixture(params=["gemma3", "llava"])
def seeing(request, folders):
    """A model that sees images, as a run loads it."""
    return load(folders[request.param])


def load(folder, labels=None):
    settings, tokenizer = ModelConfig(path=str(folder)), byte_tokenizer()
    return load_model(settings, load_architecture(settings, len(tokenizer)), tokenizer, labels, 0)


def of_the_tower(model) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(TOWER)}


def without_gradient(model, want="token_nll") -> set[str]:
    """By autograd: what a backward pass leaves without a gradient, on other tokens than are looked at."""
    model.requires_grad_(True)
    TokenScorer(model, None, 0, 7).eval()(rows_of(torch.arange(3, 25)[None]), want).sum().backward()
    left = {n for n, p in model.named_parameters(remove_duplicate=False) if p.grad is None}
    model.zero_grad()
    return left


def trains(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", [*TESTED_FAMILIES, "phi"])
def test_tested_families_reach_everything(family, monkeypatch):
    """So that they need not be looked at: a model of meta tensors could not be."""
    assert reaches_everything(config_of(family)) == (family != "phi")
    monkeypatch.setattr(reached, "reaches_everything", lambda config: False)
    assert find_unused(build(family), []) == set()
    if family in CLASSIFIERS:
        assert find_unused(build(family, AutoModelForSequenceClassification, num_labels=CLASSES), ["score"]) == set()


def test_every_tested_family_is_among_them():
    assert set(TESTED_FAMILIES) <= set(FAMILIES)


def test_a_vision_tower_takes_no_part(seeing):
    seeing.lm_head.requires_grad_(False)
    seeing.train()
    required = trains(seeing)
    unused = find_unused(seeing, [])
    assert (trains(seeing), seeing.training) == (required, True), "it only looks"
    assert all(p.grad is None for p in seeing.parameters())
    assert unused == of_the_tower(seeing) == without_gradient(seeing)
    assert idle_modules(seeing) == [seeing.model.vision_tower, seeing.model.multi_modal_projector]


def test_nor_in_the_loss_of_a_classifier(folders):
    model = load(folders["gemma3"], ["a", "b", "c"])
    assert find_unused(model, ["score"]) == of_the_tower(model) == without_gradient(model, "class_logits")


def test_unused_heads_and_parameters():
    """Beside a whole decoder: a head that nobody asks, a parameter that no forward reads, and what a tie keeps in use."""
    model = build("phi")
    model.value_head = nn.Linear(24, 1)
    model.model.layers[0].scale = nn.Parameter(torch.ones(3))
    model.tied = nn.Linear(24, 61, bias=False)
    model.tied.weight = model.lm_head.weight
    unused = find_unused(model, [])
    assert unused == {"value_head.weight", "value_head.bias", "model.layers.0.scale"} == without_gradient(model)
    assert idle_modules(model) == [model.value_head]
    (line,) = describe_unused(model, unused, FullConfig())
    assert line.startswith("28 parameters in 3 tensors take no part")
    assert line.endswith("value_head, model.layers.0.scale")


def test_cross_attention_without_an_encoder():
    """A tested family with an option that adds what text does not reach."""
    config = config_of("gpt2")
    config.add_cross_attention = True
    model = AutoModelForCausalLM.from_config(config)
    unused = find_unused(model, [])
    assert unused == without_gradient(model)
    assert {n.split(".")[3] for n in unused} == {"crossattention", "ln_cross_attn"}


def test_an_encoder_that_text_does_not_pass_is_refused(seeing):
    seeing.base_model_prefix = "nowhere"
    with pytest.raises(InputError, match=r"text alone does not pass.*nowhere"):
        find_unused(seeing, [])


def test_full_trains_the_rest(seeing):
    unused = find_unused(seeing, [])
    apply_method(FullConfig(), seeing, [], 0, unused)
    everything = {n for n, _ in seeing.named_parameters()}
    assert trains(seeing) == everything - unused
    (line,) = describe_unused(seeing, unused, FullConfig())
    count = sum(p.numel() for n, p in seeing.named_parameters() if n in unused)
    assert line.startswith(f"{count:,} parameters in {len(unused)} tensors")
    assert "model.vision_tower, model.multi_modal_projector" in line


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj"], ["*_proj"], ["*.layers.1.*"]])
def test_no_adapter_where_text_does_not_come(seeing, targets):
    unused, config = find_unused(seeing, []), LoraConfig(rank=2, targets=targets, bias=Bias.all, dropout=0.1)
    lines = describe_unused(seeing, unused, config)
    apply_method(config, seeing, [], 0, unused)
    assert lora_layers(seeing)
    assert all(n.startswith("model.language_model.layers.") for n in lora_layers(seeing))
    assert not trains(seeing) & of_the_tower(seeing)
    skipped = [n for n, m in seeing.model.vision_tower.named_modules() if isinstance(m, nn.Linear)]
    named = [n for n in skipped if targets != ["q_proj"] or n.endswith("q_proj")]
    assert 0 < int(lines[1].split()[0]) <= len(named) + 2  # LLaVA's projector has two linear layers
    assert "match method.targets and get no adapter, as model.vision_tower." in lines[1]


@pytest.mark.parametrize(("key", "value"), [("targets", "fc1"), ("modules_to_save", "multi_modal_projector")])
def test_naming_only_what_takes_no_part_is_refused(seeing, key, value):
    """The remedy of a target names layers that work."""
    unused = find_unused(seeing, [])
    settings = {"targets": ["q_proj"], key: [value, *(["q_proj"] if key == "targets" else [])]}
    with pytest.raises(InputError, match=rf"method\.{key}={value}: .* takes? no part") as error:
        apply_method(LoraConfig(rank=2, **settings), seeing, [], 0, unused)
    if key == "targets":
        kinds = error.value.remedy.partition("these take part: ")[2].split(", ")
        apply_method(LoraConfig(rank=2, targets=kinds), seeing, [], 0, unused)
        assert {n.rpartition(".")[2] for n in lora_layers(seeing)} == set(kinds)


def test_modules_to_save_may_match_both(seeing):
    """As with targets, what takes part is trained and the rest is left."""
    unused = find_unused(seeing, [])
    apply_method(LoraConfig(rank=2, targets=["q_proj"], modules_to_save=["*layer*norm*"]), seeing, [], 0, unused)
    names = {n for n in trains(seeing) if "lora_" not in n}
    assert {n for n in names if "input_layernorm" in n}
    assert not names & unused


def test_the_decoder_is_not_the_deeper_tower(seeing):
    assert len(seeing.model.vision_tower.encoder.layers) > len(seeing.model.language_model.layers)
    find_unused(seeing, [])
    assert decoder_layers(TokenScorer(seeing, None, 0, 8)) == list(seeing.model.language_model.layers)


def test_layers_for_images_among_those_of_text():
    """As Mllama has them: the list of the decoder holds two kinds of layer, of which text runs one."""
    model = build("phi")
    layers = list(model.model.layers)
    model.model.layers.append(nn.Linear(3, 3))
    model.model.config.num_hidden_layers = len(layers)
    model.tower = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
    find_unused(model, [])
    assert decoder_layers(model) == layers


def test_fsdp_gathers_no_tower(folders):
    """It is a group of its own that no forward asks for; the root's would be gathered with every one."""
    model = load(folders["gemma3"])
    apply_method(FullConfig(), model, [], 0, find_unused(model, []))
    scorer = TokenScorer(model, None, 0, 64)
    backend = Fsdp("fsdp", FsdpConfig(), make_mesh(FsdpConfig(), World(0, 1, torch.device("cpu"))), Dtype.float32)
    wrapped = backend.prepare(scorer, lambda m: make_optimizer(OptimConfig(lr=1e-4, weight_decay=0.5), m))
    before = model.model.vision_tower.head.probe.full_tensor().clone()
    seen = {}

    def look(*_):
        seen.update((n, isinstance(p, DTensor)) for n, p in model.named_parameters())

    model.model.language_model.register_forward_hook(look)
    wrapped(rows_of(torch.arange(3, 25)[None]), "token_nll").sum().backward()
    assert all(seen[n] for n in of_the_tower(model)), "it stays sharded"
    assert not seen["model.language_model.norm.weight"]
    backend.step(1.0, 1e-2, float(backend.grad_norm()))
    assert model.model.vision_tower.head.probe.full_tensor().equal(before)
    assert not any(n.removeprefix("model.").startswith(TOWER) for n in backend.tensors()), "no state is kept of it"


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_no_skeleton_of_what_must_be_looked_at(folders, labels):
    settings, tokenizer = ModelConfig(path=str(folders["gemma3"])), byte_tokenizer()
    architecture = load_architecture(settings, len(tokenizer))
    why = load_meta_model(settings, architecture, tokenizer, labels, 0, torch.float32)
    assert why == "gemma3 is no family that the tests know, and is looked at when it is loaded"


def test_the_files_decide_the_class(folders):
    """LLaVA has no plain language model; Qwen 3.5 has one that would leave the tower out."""
    for name, expected in (("gemma3", "Gemma3ForConditionalGeneration"), ("llava", "LlavaForConditionalGeneration")):
        model = load(folders[name])
        assert type(model).__name__ == expected
        require_same_logits(TokenScorer(model, None, 0, 8))
    config = config_of("llama")
    config.model_type = "qwen3_5"
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    assert auto_class(config, False).__name__ == "AutoModelForImageTextToText"
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class(config, False).__name__ == "AutoModelForCausalLM"


def test_a_classifier_that_there_is_not(folders):
    with pytest.raises(InputError, match="transformers has no classifier of llava") as error:
        load(folders["llava"], ["a", "b"])
    assert "objective=classify_token" in error.value.remedy
