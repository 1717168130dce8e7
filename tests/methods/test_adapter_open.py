"""Adapters opened to be read compute what PEFT computes, or are refused by the name of what is not opened here."""

from __future__ import annotations

import copy
import datetime
import json
import random
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.trainer.batch import rows_of
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.config.data import DataConfig
from tritune.trainer.errors import InputError
from tritune.trainer.evaluation.generate import generate
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.objectives.classify import ClassifyConfig
from tritune.trainer.open import open_model
from tritune.trainer.parallel.distributed import start

IDS = torch.randint(5, 261, (2, 13), generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the same layers of the same library: what is left is nothing, or rounding
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """A small Llama with biases, all of them random, saved with its tokenizer: tied (True) or not."""
    found, tokenizer = {}, byte_tokenizer()
    for tied in (True, False):
        settings = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
                    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "tie_word_embeddings": tied,
                    "attention_bias": True, "mlp_bias": True}  # fmt: skip
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        found[tied] = tmp_path_factory.mktemp(f"base-{tied}")
        model.save_pretrained(found[tied])
        tokenizer.save_pretrained(found[tied])
    return found


def write(base, where: Path, seed: int = 0, auto=AutoModelForCausalLM, rows: int = 0, options=None, **settings):
    """An adapter by PEFT on a folder or a model, of which everything that trains has moved."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    torch.manual_seed(seed)
    model = auto.from_pretrained(base, **(options or {})) if isinstance(base, Path) else copy.deepcopy(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(where)
    return where


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def theirs(base: Path, adapter: Path, auto=AutoModelForCausalLM, **options):
    return peft.PeftModel.from_pretrained(auto.from_pretrained(base, **options), adapter)


def read(adapter: Path | str, path: Path | str | None = None, **settings):
    given = {"path": str(adapter)} if path is None else {"path": str(path), "adapter": str(adapter)}
    config = Config(model=ModelConfig(**given, **settings))
    return open_model(config, None, start(BackendConfig(), False))


def drawn(rng: random.Random) -> tuple[bool, dict]:
    """Settings as other trainers write them; whether the base is tied."""
    settings = {
        "target_modules": rng.choice([
            ["q_proj", "v_proj"], ALL, "all-linear", r".*\.layers\.[01]\..*(q_proj|v_proj)", r".*(gate|down)_proj",
            ["layers.0.self_attn.q_proj", "mlp.up_proj"], ["model.layers.2.mlp.down_proj", "o_proj"],
        ]),
        "exclude_modules": rng.choice([None, None, ["layers.1.self_attn.q_proj", "o_proj"], r".*layers\.1.*"]),
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "modules_to_save": rng.choice([None, None, ["embed_tokens"], ["lm_head"], BOTH]),
        "rank_pattern": rng.choice([{}, {}, {"q_proj": 2, "up_proj": 5}, {r"layers\.0\..*_proj": 3}]),
        "alpha_pattern": rng.choice([{}, {}, {"v_proj": 17}, {r"layers\.[02]\..*": 9}]),
        "use_rslora": rng.random() < 0.2,
        "use_dora": rng.random() < 0.2,
        "layers_to_transform": rng.choice([None, None, None, [0, 2]]),
        "init_lora_weights": rng.choice([True, False, "gaussian"]),
    }  # fmt: skip
    if isinstance(settings["target_modules"], str):  # PEFT's own rule
        settings["layers_to_transform"] = None
    return rng.random() < 0.5, settings


def test_fifty_random_adapters_open_as_peft_opens_them(bases, tmp_path):
    seed = datetime.date.today().toordinal()
    print(f"seed {seed}")
    rng, moved = random.Random(seed), 0
    stock = {tied: AutoModelForCausalLM.from_pretrained(base) for tied, base in bases.items()}
    untouched = {tied: logits(model) for tied, model in stock.items()}
    for number in range(50):
        tied, settings = drawn(rng)
        adapter = write(stock[tied], tmp_path / f"{number}", number, **settings)
        expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(stock[tied]), adapter))
        difference = float((logits(read(adapter).model) - expected).abs().max())
        assert difference <= 1e-5, (difference, tied, settings)
        moved += bool((expected - untouched[tied]).abs().max() > 0.05)
    assert moved == 50


# What other trainers write: an expression for the targets, one for what is left out, a tied base whose two ends drifted apart.
OTHERS = {
    "regex": {"target_modules": r".*\.layers\.[0-1]\..*(q_proj|v_proj)"},
    "exclude": {"exclude_modules": r".*layers\.2.*"},
    "untied": {"modules_to_save": BOTH},
    "fan out of the rank": {"rank_pattern": {"q_proj": 2}, "lora_bias": True, "bias": "none"},
    "dora": {"use_dora": True, "bias": "all"},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "trained tokens": {"trainable_token_indices": [7, 8, 97]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "one saved, both tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_forms_of_other_trainers(bases, tmp_path, kind):
    """In float32 as in PEFT; scored and generated from; in float64 and bfloat16 no further from it than rounding."""
    adapter = write(bases[True], tmp_path, **OTHERS[kind])
    stock = theirs(bases[True], adapter)
    opened = read(adapter)
    torch.testing.assert_close(logits(opened.model), logits(stock), **CLOSE)
    nll = TokenScorer(opened.model, None, 0, 4).eval()(rows_of(IDS), "token_nll")
    expected = logits(stock)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).flatten()
    torch.testing.assert_close(nll.detach(), -expected, rtol=1e-4, atol=1e-4)
    settings = Config().generate
    settings.max_new_tokens = 6
    (answer,) = generate(opened.model, opened.model.generate, opened.tokenizer, [IDS[0].tolist()], settings, [],
                         torch.device("cpu"))[0]  # fmt: skip
    said = stock.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, IDS.shape[1] :]
    assert answer.text == opened.tokenizer.decode(said, skip_special_tokens=True)
    exact = read(adapter, dtype=Dtype.float64).model
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    wide = TokenScorer(exact, None, 0, 4).eval()(rows_of(IDS), "token_nll")
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.detach().float(), -expected, rtol=1e-4, atol=1e-4)
    half = read(adapter, dtype=Dtype.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    rough = theirs(bases[True], adapter, dtype=torch.bfloat16)
    error = (logits(rough).float() - logits(stock)).abs().max()
    assert (logits(half).float() - logits(stock)).abs().max() < 3 * error


def test_a_classifier_of_pefts(bases, tmp_path):
    options = {"num_labels": 3, "pad_token_id": 0}
    adapter = write(
        bases[False], tmp_path, auto=AutoModelForSequenceClassification, options=options, task_type="SEQ_CLS"
    )
    config = Config(model=ModelConfig(path=str(adapter)), objective=ClassifyConfig(),
                    data=DataConfig(labels=["a", "b", "c"]))  # fmt: skip
    opened = open_model(config, None, start(BackendConfig(), False))
    expected = logits(theirs(bases[False], adapter, AutoModelForSequenceClassification, **options))
    torch.testing.assert_close(logits(opened.model), expected, **CLOSE)
    scored = TokenScorer(opened.model, None, 0, 4).eval()(rows_of(IDS), "class_logits")
    torch.testing.assert_close(scored.detach(), expected, **CLOSE)
    for text, words in (("{", "does not read"), ('{"a": 1}', "is no list")):
        config.data.labels = []
        (adapter / "labels.json").write_text(text)
        with pytest.raises(InputError, match=f"labels.json {words}"):
            open_model(config, None, start(BackendConfig(), False))
    config.data.labels = ["a", "b"]
    with pytest.raises(InputError, match="score"):
        open_model(config, None, start(BackendConfig(), False))


@pytest.mark.parametrize(("rows", "saved"), [(270, BOTH), (272, None)])
def test_a_vocabulary_that_grew(bases, tmp_path, rows, saved):
    """Tokens were added, and the table padded: PEFT saves it whole, and whoever opens it resizes the base first."""
    adapter = write(bases[True], tmp_path, rows=rows, modules_to_save=saved)
    base = AutoModelForCausalLM.from_pretrained(bases[True])
    base.resize_token_embeddings(rows, mean_resizing=False)
    ids = torch.cat([IDS, torch.tensor([[rows - 1], [262]])], dim=1)
    expected = logits(peft.PeftModel.from_pretrained(base, adapter), ids)
    opened = read(adapter, add_tokens=["<one>", "<two>"])
    torch.testing.assert_close(logits(opened.model, ids), expected, **CLOSE)


def test_an_adapter_whose_base_has_moved(bases, tmp_path):
    """The remedy that the refusal names opens it."""
    adapter = write(bases[False], tmp_path / "adapter")
    expected = logits(theirs(bases[False], adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for told in (str(tmp_path / "gone"), None):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": told}))
        with pytest.raises(InputError) as refused:
            read(adapter)
        assert f"model.adapter={adapter} model.path=" in str(refused.value)
        assert told is None or told in refused.value.rule
        torch.testing.assert_close(logits(read(adapter, bases[False]).model), expected, **CLOSE)
    with pytest.raises(InputError, match=r"model\.adapter=.*no adapter_config.json"):
        read(bases[True], bases[False])


REFUSED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [7, 8]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "target_parameters": {"target_parameters": ["q_proj.weight"], "target_modules": []},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_test_compares_is_refused_by_name(bases, tmp_path, name):
    with pytest.raises(InputError, match=name):
        read(write(bases[False], tmp_path, **REFUSED[name]))


def test_other_kinds_of_adapter_are_refused(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases[False])
    kind = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(model, kind).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="IA3"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "does not read"), ("[]", "no settings"), ({"peft_type": None}, "None adapter"), ({"r": "four"}, "r=four"),
        ({"r": 0}, "r=0"), ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"), ({"target_modules": 3}, "does not fit"),
        ({"lora_alpha": [1]}, "lora_alpha"), ({"target_modules": ["absent"]}, "absent"), ({"bias": "some"}, "some"),
        ({"target_modules": "("}, "does not fit"), ({"base_model_name_or_path": 7}, "is no text"), ("\xff", "does not read"),
        ({"task_type": []}, "is no text"), ({"of_a_later_peft": True}, "of_a_later_peft"),
        ({"modules_to_save": 5}, "does not fit"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(bases, tmp_path, settings, words):
    adapter = write(bases[False], tmp_path)
    file = adapter / "adapter_config.json"
    if isinstance(settings, str):
        file.write_bytes(settings.encode("latin1"))
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError, match=words):
        read(adapter)


def test_settings_without_a_key(bases, tmp_path):
    adapter = write(bases[False], tmp_path, target_modules=["q_proj", "o_proj"])
    file = adapter / "adapter_config.json"
    whole = json.loads(file.read_text())
    for key in ("peft_type", "target_modules", "r"):  # what PEFT takes instead does not fit
        file.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(InputError):
            read(adapter)


def test_a_file_that_is_not_whole_or_holds_more(bases, tmp_path):
    """Each of these PEFT opens with a warning, or none."""
    adapter = write(bases[False], tmp_path / "a", bias="all", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    lora, bias = (next(n for n in whole if part in n) for part in ("lora_B", "bias"))
    for lacking in (lora, bias, "base_model.model.lm_head.weight"):
        save_file({n: t for n, t in whole.items() if n != lacking}, file)
        with pytest.raises(InputError, match="missing from") as refused:
            read(adapter)
        assert lacking in str(refused.value)
    for name, tensor in (
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.ones(4, 16)),
        ("q_proj.weight", torch.ones(2)), (lora.replace("q_proj", "o_proj").replace("v_proj", "o_proj"), torch.ones(16, 4)),
    ):  # fmt: skip
        save_file({**whole, name: tensor}, file)
        with pytest.raises(InputError, match="has no place") as refused:
            read(adapter)
        assert name in str(refused.value)
    save_file(whole | {lora: torch.ones(5, 4)}, file)
    with pytest.raises(InputError, match=r"does not fit its base.*size mismatch for .*lora_B"):
        read(adapter)
    file.write_bytes(b"not whole")
    with pytest.raises(InputError, match="does not read"):
        read(adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="other formats can run code"):
        read(adapter)
