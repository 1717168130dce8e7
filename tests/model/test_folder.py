"""Hostile folders of models, tokenizers and adapters: refused by name before a library reads, builds or hangs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_open import add_saved_adapter, read_settings
from tritune.trainer.model.fingerprint import fingerprint
from tritune.trainer.model.load import load_architecture, load_model
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 64)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def change(file: Path, f: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    f(content)
    file.write_text(json.dumps(content))


def refusal(call: Callable[[], object], words: str) -> str:
    """Call, and require an InputError that holds `words`, within seconds."""
    began = time.monotonic()
    with pytest.raises(InputError) as found:
        call()
    assert words in str(found.value)
    assert time.monotonic() - began < 10
    return str(found.value)


def opened(folder: Path) -> None:
    """All that is read of a folder before there are weights."""
    model = ModelConfig(path=str(folder))
    load_tokenizer(model)
    load_architecture(model, 261)


def test_the_folder_as_it_is_opens(folder):
    opened(folder)


@pytest.mark.parametrize("name", [*SETTINGS, "tokenizer.json", "model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "dangling"])
def test_only_regular_files_are_opened(folder, name, kind):
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "endless" else "/nowhere")
    said = refusal(lambda: opened(folder), f"its {name} is no regular file")
    assert said.startswith(f"model.path={folder}: ")
    refusal(lambda: load_architecture(ModelConfig(path=str(folder)), 261), f"its {name} is no regular file")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe", b"\0" * 99,
                                     b'{"a": "' + b"x" * 11_000_000 + b'"}'])  # fmt: skip
def test_settings_that_are_none_are_named(folder, name, content):
    (folder / name).write_bytes(content)
    refusal(lambda: opened(folder), f"its {name} ")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("num_labels", 10**8, "says num_labels=100000000, and there are at most 1,000,000"),
     ("num_hidden_layers", 10**7, "says num_hidden_layers=10000000"), ("attention_dropout", 5, "attention_dropout=5"),
     ("architectures", "x", "says architectures=x"), ("architectures", [1], "says architectures=[1]"),
     ("return_dict", False, "says return_dict=False"), ("torchscript", True, "says torchscript=True"),
     ("text_config", {"model_type": "llama"}, "its text config is a dict"),
     ("text_config", {"num_hidden_layers": 10**7}, "says text_config.num_hidden_layers=10000000"),
     ("rope_theta", 0, "says rope_theta=0, and it is a finite number above 0"), ("rope_theta", float("nan"), "rope_theta=nan"),
     ("rope_parameters", {"full_attention": {"rope_theta": -1.0}}, "says rope_parameters.full_attention.rope_theta=-1.0"),
     ("rms_norm_eps", float("nan"), "says rms_norm_eps=nan"), ("rms_norm_eps", 0, "says rms_norm_eps=0"),
     ("vision_config", {"layer_norm_eps": -1}, "says vision_config.layer_norm_eps=-1"),
     ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "its weights are quantised (bitsandbytes)"),
     ("quantization_config", "x", "its weights are quantised (x)")],
)  # fmt: skip
def test_numbers_that_would_be_built_and_kinds_that_nothing_reads_are_named(folder, key, value, words):
    change(folder / "config.json", lambda c: c.__setitem__(key, value))
    assert refusal(lambda: opened(folder), words).startswith(f"model.path={folder}: ")


def test_numbers_of_a_model_that_is_given_as_a_config(folder):
    config = ModelConfig(config={"model_type": "llama", "rms_norm_eps": float("inf")}, tokenizer=str(folder))
    assert refusal(lambda: load_architecture(config, 261), "rms_norm_eps=inf").startswith("model.config: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = ModelConfig(path=str(folder))
    said = refusal(
        lambda: load_model(model, load_architecture(model, 261), byte_tokenizer(), None, 0), "model.norm.weight"
    )
    assert said.startswith(f"model.path={folder}: 1 of its tensors holds NaN or Inf: model.norm.weight")


def test_large_weights_are_numbers(folder):
    """Their sum is infinite, and they are not."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = ModelConfig(path=str(folder))
    load_model(model, load_architecture(model, 261), byte_tokenizer(), None, 0)


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("lora_alpha", float("nan"), "says lora_alpha=nan, and an alpha is a number above 0"),
     ("lora_alpha", float("inf"), "lora_alpha=inf"), ("lora_alpha", 1e308, "lora_alpha=1e+308"), ("lora_alpha", 0, "=0, and"),
     ("lora_alpha", "4", "lora_alpha=4"), ("r", 0, "says r=0, and a rank is a whole number from 1"), ("r", 1.5, "r=1.5"),
     ("r", 10**9, "r=1000000000"), ("r", True, "r=True"), ("lora_dropout", float("nan"), "lora_dropout=nan"),
     ("lora_dropout", 2, "lora_dropout=2"), ("rank_pattern", {"q_proj": -1}, "says rank_pattern.q_proj=-1"),
     ("alpha_pattern", {"q_proj": float("nan")}, "says alpha_pattern.q_proj=nan")],
)  # fmt: skip
def test_numbers_of_an_adapter_that_give_none_are_named(tmp_path, key, value, words):
    (tmp_path / "adapter_model.safetensors").touch()
    for settings in (ADAPTER, {"peft_type": "LORA", "lora_dropout": None}):  # what is not there is PEFT's own
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        read_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {key: value}))
    assert refusal(lambda: read_settings(tmp_path), words).startswith(
        f"model.path={tmp_path}: its adapter_config.json says"
    )


def test_weights_of_an_adapter_that_are_no_numbers_are_named(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.tensor([[1.0, float("nan")]])}, tmp_path / "adapter_model.safetensors")
    refusal(lambda: add_saved_adapter(tmp_path, None, 0), f"its {name} holds NaN or Inf")


def replace_steps(*steps: dict) -> Callable[[dict], object]:
    return lambda t: t.__setitem__("normalizer", {"type": "Sequence", "normalizers": list(steps)})


TENFOLD = {"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lambda t: t["model"]["vocab"].__setitem__("evil", 10**9), "its highest id is 1,000,000,000"),
     (replace_steps(*[TENFOLD] * 9), "its normaliser makes up to 1,000,000,000 characters of one"),
     (replace_steps({"type": "Prepend", "prepend": "x" * 1_000_000}), "its normaliser makes up to 1,000,001"),
     (lambda t: t.__setitem__("model", {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                                        "max_input_chars_per_word": 100, "vocab": {"a": 0}}), "tokenizer"),
     (lambda t: t.__setitem__("post_processor", {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                                                 "single": [{"SpecialToken": {"id": "z", "type_id": 0}}]}), "tokenizer"),
     (lambda t: t.pop("model"), "no tokenizer loads from it")],
    ids=["ids", "replace", "prepend", "no unknown word", "panic", "no model"],
)  # fmt: skip
def test_tokenizers_that_fail_or_blow_up_are_named(folder, spoil, words):
    change(folder / "tokenizer.json", spoil)
    refusal(lambda: load_tokenizer(ModelConfig(path=str(folder))), words)


@pytest.mark.parametrize("template", [5, [[1]], {"default": 5}])
def test_a_template_that_is_no_text_is_named(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder / "tokenizer_config.json", lambda c: c.__setitem__("chat_template", template))
    refusal(lambda: load_tokenizer(ModelConfig(path=str(folder))), f"model.path={folder}")


@pytest.mark.parametrize(
    "header", [2**63, 2**64 - 1, b"[" * 100_000, b'{"a": {"data_offsets": [9, 1], "dtype": "F32", "shape": [1]}}']
)
def test_headers_of_weights_that_do_not_read_are_named(folder, header):
    file = folder / "model.safetensors"
    text = header if isinstance(header, bytes) else b"{}"
    length = header if isinstance(header, int) else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(64))
    model = ModelConfig(path=str(folder))
    refusal(lambda: fingerprint(model), f"model.path={folder}")
    architecture = load_architecture(model, 261)
    refusal(lambda: load_model(model, architecture, byte_tokenizer(), None, 0), f"model.path={folder}")


def test_an_index_that_nests_without_an_end_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    refusal(lambda: fingerprint(ModelConfig(path=str(folder))), "model.safetensors.index.json does not read")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '"x"'])
def test_an_adapters_settings_that_are_none_are_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    refusal(lambda: read_settings(tmp_path), "its adapter_config.json ")


def test_an_adapters_pipe_is_not_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    refusal(lambda: read_settings(tmp_path), "its adapter_model.safetensors is no regular file")
