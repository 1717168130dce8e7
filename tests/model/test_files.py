"""Where weights are found: one file or several, a head that stands for both ends, a hub's cache; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import harness
import huggingface_hub.constants
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritune.launch.cli import main as cli
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.errors import InputError
from tritune.trainer.model.files import weight_files
from tritune.trainer.model.fingerprint import fingerprint
from tritune.trainer.model.load import load_architecture, load_model
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.open import open_model
from tritune.trainer.parallel.box import Box
from tritune.trainer.parallel.distributed import start

IDS = torch.randint(5, 261, (2, 13), generator=torch.Generator().manual_seed(3))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 192)


@pytest.fixture
def parts(base, tmp_path) -> Path:
    """The base in several files."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "parts")
    return tmp_path / "parts"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def load(path: Path | str, labels=None):
    settings, tokenizer = ModelConfig(path=str(path)), byte_tokenizer()
    return load_model(settings, load_architecture(settings, len(tokenizer)), tokenizer, labels, 0)


def meta(path: Path | str):
    settings, tokenizer = ModelConfig(path=str(path)), byte_tokenizer()
    return load_meta_model(settings, load_architecture(settings, len(tokenizer)), tokenizer, None, 0, torch.float32)


def require_whole(path: Path | str, expected: AutoModelForCausalLM) -> None:
    """Loaded whole, and as a meta model whose parameters are read one by one."""
    assert torch.equal(logits(load(path)), logits(expected))
    model, weights = meta(path)
    for name, parameter in model.named_parameters():
        held = weights.read(name, Box((0,) * parameter.ndim, tuple(parameter.shape)))
        assert torch.equal(held, expected.get_parameter(name)), name


def write_adapter(base: Path, where: Path, named: str, **settings) -> Path:
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(where)
    file = where / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named, **settings}))
    return where


def read(path: Path | str) -> torch.Tensor:
    return logits(open_model(Config(model=ModelConfig(path=str(path))), None, start(BackendConfig(), False)).model)


def test_one_file_or_several(base, parts, tmp_path):
    assert len(weight_files(str(parts))) > 3
    stock = AutoModelForCausalLM.from_pretrained(base)
    require_whole(base, stock)
    require_whole(parts, stock)
    adapter = write_adapter(base, tmp_path / "adapter", str(parts))
    assert torch.equal(read(adapter), logits(peft.PeftModel.from_pretrained(stock, adapter)))


def test_a_tied_model_of_which_only_the_head_is_stored(base, tmp_path):
    where = tmp_path / "head"
    shutil.copytree(base, where)
    tensors = load_file(where / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(base)
    require_whole(where, stock)
    assert torch.equal(load(where, ["a", "b"]).model.embed_tokens.weight, stock.model.embed_tokens.weight)
    adapter = write_adapter(base, tmp_path / "adapter", str(where))
    assert torch.equal(read(adapter), logits(peft.PeftModel.from_pretrained(stock, adapter)))


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "{}/out.safetensors", "sub/out.safetensors", "model.bin", "..", 7, ["a"]]
)
def test_an_index_that_names_other_files_is_refused(base, parts, tmp_path, name):
    """A file outside of the folder, or one whose format can run code: before anything of it is opened."""
    name = name.format(tmp_path) if isinstance(name, str) else name
    shutil.copy(base / "model.safetensors", tmp_path / "out.safetensors")
    index = json.loads((parts / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (parts / INDEX).write_text(json.dumps(index))
    for opens in (load, meta, read, lambda path: fingerprint(ModelConfig(path=str(path)))):
        with pytest.raises(InputError, match=INDEX) as refused:
            opens(parts)
        assert isinstance(name, list) or repr(name) in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": "absent.safetensors"}}'])
def test_an_index_that_does_not_read_is_refused(parts, text):
    (parts / INDEX).write_text(text)
    for opens in (load, meta):
        with pytest.raises(InputError, match=r"model\.path="):
            opens(parts)


def test_weights_that_a_config_names_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "named")
    config = json.loads((base / "config.json").read_text()) | {"transformers_weights": "adapter_model.bin"}
    (tmp_path / "named" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"adapter_model\.bin"):
        load(tmp_path / "named")


def test_an_adapter_is_no_model_to_train(tritune, base, tiny, tmp_path):
    """Transformers would load the base with the adapter on it, and nobody would know."""
    adapter = write_adapter(base, tmp_path / "adapter", str(base))
    byte_tokenizer().save_pretrained(adapter)
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for file in adapter.iterdir():
        shutil.copy(file, both)
    options = [o for o in tiny if not o.startswith("model")]
    for words, said in (
        (
            [f"model.path={adapter}"],
            "its adapter is of method=lora, and method=full would train. Give method=lora, or begin",
        ),
        (
            [f"model.path={base}", f"model.adapter={adapter}"],
            "its adapter is of method=lora, and method=full would train",
        ),
        ([f"model.path={both}"], f"model.path={both}: it holds a whole model and an adapter"),
    ):
        result = tritune(*options, *words, f"run.dir={tmp_path / 'run'}")
        assert result.code == 2
        assert said in result.err


# -- a hub's cache, without a network ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(name, revision, folder)` puts a folder where the hub's client would have downloaded it."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name: str, revision: str, folder: Path) -> str:
        repo, commit = root / f"models--{name.replace('/', '--')}", f"{len(list(root.rglob('refs/*'))):x}" * 40
        shutil.copytree(folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        return name

    return put


def test_bases_and_adapters_by_their_hub_ids(hub, base, parts, tmp_path):
    """Whole and as a meta model, by content, under an adapter; the base's revision is the one that the adapter names."""
    other = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.ones_(other.model.norm.weight)
    other.model.norm.weight.data *= 3
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    hub("me/base", "main", parts)
    hub("me/base", "v2", tmp_path / "other")
    stock = AutoModelForCausalLM.from_pretrained(base)
    require_whole("me/base", stock)
    assert fingerprint(ModelConfig(path="me/base")) == fingerprint(ModelConfig(path=str(base)))
    for revision, model in ((None, stock), ("v2", other)):
        adapter = write_adapter(base, tmp_path / f"adapter-{revision}", "me/base", revision=revision)
        expected = logits(peft.PeftModel.from_pretrained(model, adapter))
        name = hub(f"me/adapter-{revision}", "main", adapter)
        torch.testing.assert_close(read(name), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(read(adapter), expected, rtol=1e-6, atol=1e-6)
    config = Config(model=ModelConfig(path=str(base), adapter="me/adapter-None"))
    opened = open_model(config, None, start(BackendConfig(), False))
    torch.testing.assert_close(logits(opened.model), read("me/adapter-None"), rtol=1e-6, atol=1e-6)
    for absent in ("me/absent", "me/absent/too/deep"):
        with pytest.raises(InputError, match=r"model\.path=me/absent"):
            read(absent)


def test_a_run_on_a_base_of_the_hub(hub, tritune, base, tiny, tmp_path, capfd):
    """Trained, exported, read back with PEFT, and evaluated as the adapter that it is."""
    hub("me/base", "main", base)
    options = [o for o in tiny if not o.startswith(("model", "export", "train.max"))]
    run, data = tmp_path / "run", ["data.validation_share=0.2"]
    result = tritune(*options, *data, "model.path=me/base", "method=lora", "train.max_steps=1", f"run.dir={run}")
    assert result.code == 0, result.err
    assert "reloaded with PEFT" in result.err
    assert json.loads((run / "export" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    capfd.readouterr()
    given = [o for o in options if o.startswith(("data", "backend"))]
    assert cli(["evaluate", f"model.path={run / 'export'}", *given, *data, "objective=sft"]) == 0
    tuned = json.loads((run / "summary.json").read_text())["eval"]["validation"]["tuned"]["loss"]
    assert f"{tuned:,.4f}" in capfd.readouterr().out
    assert cli(["evaluate", f"run.dir={run}", f"model.path={base}"]) == 0, "the same base, downloaded by hand"
