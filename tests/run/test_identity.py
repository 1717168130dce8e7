"""A run is known by what its files hold, not by where they lie: bases and data that moved, and such as are other ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritune.launch.cli import main as cli
from tritune.trainer.__main__ import main
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError
from tritune.trainer.model.fingerprint import BLOCK, BLOCKS, _blocks, difference, fingerprint
from tritune.trainer.model.tokenizer import byte_tokenizer


def of(where: Path) -> dict:
    found = fingerprint(ModelConfig(path=str(where)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 192)


def test_files_and_places_do_not_count_and_content_does(base, tmp_path):
    kept = of(base)
    assert of(base) == kept
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert of(tmp_path / "parts") == kept
    assert difference(kept, of(tmp_path / "parts")) is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    model.save_pretrained(tmp_path / "other")
    assert "model.layers.1.mlp.up_proj.weight" in difference(kept, of(tmp_path / "other"))
    assert difference(kept, of(tmp_path / "other"), weights=False) is None
    for change, words in (
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"_name_or_path": "x", "transformers_version": "1"}, None),
    ):
        settings = json.loads((base / "config.json").read_text())
        (tmp_path / "parts" / "config.json").write_text(json.dumps(settings | change))
        said = difference(kept, of(tmp_path / "parts"), weights=False)
        assert words in said if words else said is None
    assert fingerprint(ModelConfig(config={"model_type": "llama"})) is None


def test_little_is_read_of_a_tensor_its_ends_among_it(tmp_path):
    """Of 4 MB, 4 KB: another dtype, another shape or another value at either end is another tensor."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    whole, found = torch.zeros(1 << 20), []
    for tensor in (whole, whole.view(2, -1), whole.view(torch.int32)):
        save_file({"a": tensor}, file)
        found.append(of(tmp_path)["tensors"]["a"])
    for place in (0, -1):
        changed = whole.clone()
        changed[place] = 1
        save_file({"a": changed}, file)
        found.append(of(tmp_path)["tensors"]["a"])
    assert len(set(found)) == 5
    assert sum(size for _, size in _blocks("a", 4 << 20)) == BLOCK * BLOCKS == 4096
    assert _blocks("a", 100) == [(0, 100)]


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]", b'\5\0\0\0\0\0\0\0{"a"'])
def test_a_broken_file_is_the_inputs_fault(base, tmp_path, content):
    shutil.copy(base / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.path="):
        of(tmp_path)


# -- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[dict[str, str], list[str], Path]:
    """Where the files of a finished LoRA run lie, by key; its other overrides; its directory."""
    root = tmp_path_factory.mktemp("finished")
    harness.write_prompts(root / "rows.jsonl", 40, seed=1)
    harness.write_prompts(root / "held.jsonl", 12, seed=2)
    shutil.copytree(base, root / "base")
    places = {"model.path": root / "base", "data.train": root / "rows.jsonl", "data.validation": root / "held.jsonl"}
    options = ["data.max_length=96", "train.batch_size=8", "train.max_steps=2", "backend.device=cpu", "method=lora",
               "method.rank=2", "export.enabled=false", "report.enabled=false", "evaluation.samples=0",
               "optim.lr=1e-2"]  # fmt: skip
    with harness.keeping_signals():
        assert main([*options, *(f"{k}={v}" for k, v in places.items()), f"run.dir={root / 'run'}"]) == 0
    return places, options, root / "run"


@pytest.fixture
def elsewhere(finished, tmp_path):
    """The run and its files, all of them copied to other places and names."""
    places, options, run = finished
    shutil.copytree(run, tmp_path / "run")
    there = {
        "model.path": tmp_path / "moved",
        "data.train": tmp_path / "a.jsonl",
        "data.validation": tmp_path / "b.jsonl",
    }
    for key, place in there.items():
        (shutil.copytree if places[key].is_dir() else shutil.copy)(places[key], place)
    return there, options, tmp_path / "run"


def again(tritune, there: dict[str, Path], options: list[str], run: Path):
    return tritune(*options, *(f"{k}={v}" for k, v in there.items()), f"run.dir={run}")


def test_a_run_goes_on_with_base_and_data_elsewhere(tritune, elsewhere):
    there, options, run = elsewhere
    model = AutoModelForCausalLM.from_pretrained(there["model.path"])
    (there["model.path"] / "model.safetensors").unlink()
    model.save_pretrained(there["model.path"], max_shard_size="20KB")  # in parts this time
    before = harness.rows(run)
    result = again(tritune, there, options, run)
    assert result.code == 0, result.err
    assert "resume" in result.err
    assert harness.rows(run) == before
    assert str(there["model.path"]) in (run / "config.yaml").read_text()


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.validation"])
def test_what_moved_and_changed_is_refused_with_both_named(tritune, finished, elsewhere, key):
    there, options, run = elsewhere
    old = finished[0][key]
    if key == "model.path":
        file = there[key] / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        there[key].write_text(there[key].read_text().replace("cat", "dog"))
    result = again(tritune, there, options, run)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert f"{key}={there[key]}" in result.err
    assert f"{key}: {old} -> {there[key]}" in result.err
    assert ("model.norm.weight" if key == "model.path" else "tokens") in result.err


def test_content_that_changed_in_its_place_is_refused(tritune, elsewhere):
    there, options, run = elsewhere
    assert again(tritune, there, options, run).code == 0
    there["data.validation"].write_text(there["data.validation"].read_text().replace("cat", "dog"))
    result = again(tritune, there, options, run)
    assert result.code == 2
    assert "the split validation has other tokens" in result.err


def call(capfd, *argv: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli(list(argv))
    out = capfd.readouterr()
    return code, out.out, out.err


def test_a_run_is_read_with_its_base_elsewhere(finished, elsewhere, capfd, tmp_path):
    """`model.path` beside `run.dir`: the remedy of the refusal when the base has gone."""
    there, _, run = elsewhere
    config = run / "config.yaml"
    gone = tmp_path / "gone"
    config.write_text(config.read_text().replace(str(finished[0]["model.path"]), str(gone)))
    code, _, err = call(capfd, "evaluate", f"run.dir={run}")
    assert code == 2
    assert f"model.path={gone}" in err
    assert "beside run.dir: model.path=" in err
    place = f"model.path={there['model.path']}"
    code, _, err = call(capfd, "evaluate", f"run.dir={run}", place)
    assert code == 0, err
    figures = json.loads((run / "evaluation.json").read_text())["eval"]["validation"]
    assert figures == json.loads((run / "summary.json").read_text())["eval"]["validation"]["tuned"]
    code, said, err = call(capfd, "generate", f"run.dir={run}", place, "-p", "the cat", "generate.max_new_tokens=3")
    assert code == 0, err
    code, _, err = call(capfd, "export", f"run.dir={run}", place, f"export.dir={tmp_path / 'out'}")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        there["model.path"]
    )
    answer = ["-p", "the cat", "generate.max_new_tokens=3"]
    assert call(capfd, "generate", f"model.path={tmp_path / 'out'}", *answer)[:2] == (0, said)
    # Another base under the adapter, or none that the run wrote down.
    other = AutoModelForCausalLM.from_pretrained(there["model.path"])
    torch.nn.init.ones_(other.model.layers[0].mlp.down_proj.weight)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for verb in (["evaluate"], ["generate", *answer], ["export"]):
        code, out, err = call(capfd, verb[0], f"run.dir={run}", f"model.path={tmp_path / 'other'}", *verb[1:])
        assert (code, out) == (2, ""), err
        assert "model.layers.0.mlp.down_proj.weight" in err
        assert f"model.path: {gone} -> {tmp_path / 'other'}" in err
    (run / "content.json").unlink()
    code, _, err = call(capfd, "generate", f"run.dir={run}", place, *answer)
    assert code == 0
    assert "did not write down" in err
