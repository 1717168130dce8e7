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
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError
from tritune.trainer.fingerprint import fingerprint
from tritune.trainer.methods.adapter_open import read_settings
from tritune.trainer.model import load_architecture, load_model
from tritune.trainer.tokenizer import byte_tokenizer, load_tokenizer

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
     ("text_config", {"num_hidden_layers": 10**7}, "says text_config.num_hidden_layers=10000000")],
)  # fmt: skip
def test_numbers_that_would_be_built_and_kinds_that_nothing_reads_are_named(folder, key, value, words):
    change(folder / "config.json", lambda c: c.__setitem__(key, value))
    assert refusal(lambda: opened(folder), words).startswith(f"model.path={folder}: ")


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
