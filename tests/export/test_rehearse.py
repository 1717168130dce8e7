"""What would fail in the export is found before the first step; a run that has trained never loses its result to it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import harness
import pytest
import torch
from safetensors.torch import load_file
from tritune.launch.cli import main as cli
from tritune.trainer import finish
from tritune.trainer.errors import ExportError
from tritune.trainer.export import rehearse, tokenizer_files


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return harness.save_small_llama(tmp_path_factory.mktemp("model") / "base", 192)


@pytest.fixture
def run(tritune, sft_file, tmp_path, base):
    """Train four steps on a copy of the base, in which a file may be written first."""
    model = tmp_path / "model"
    shutil.copytree(base, model)

    def call(*overrides, **files):
        for name, content in files.items():
            (model / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tritune(f"model.path={model}", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=8",
                       "train.max_steps=2", "backend.device=cpu", f"run.dir={tmp_path / 'run'}", *overrides)  # fmt: skip

    return call


SAMPLING = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 9}


def test_a_generation_config_that_could_not_be_saved_is_repaired_and_said(run, tmp_path):
    result = run("method=lora", generation_config=SAMPLING)
    assert result.code == 0
    said = [line for line in result.lines() if "generation config's" in line]
    assert [line.split("'s ")[1].split(" is")[0] for line in said] == ["temperature=0.9", "top_p=0.6"]
    written = json.loads((tmp_path / "run/export/generation_config.json").read_text())
    assert not {"temperature", "top_p"} & set(written)
    assert (written["max_new_tokens"], written["pad_token_id"]) == (9, 0)
    assert (
        cli(["export", f"run.dir={tmp_path / 'run'}", "export.form=merged", f"export.dir={tmp_path / 'merged'}"]) == 0
    )


@pytest.mark.parametrize("content", ["{broken", "[1]", {"eos_token_id": "two"}, {"eos_token_id": [2, None, 1.5]}])
def test_a_generation_config_that_cannot_be_read_is_refused_and_its_remedy_works(run, tmp_path, content):
    result = run(generation_config=content)
    assert result.code == 2
    assert "its generation_config.json" in result.lines()[-1]
    (tmp_path / "model/generation_config.json").unlink()
    assert run("train.max_steps=1", "export.enabled=false", "report.enabled=false").code == 0


def test_a_folder_that_cannot_be_made_is_refused_before_a_step(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(f"export.dir={tmp_path / 'file' / 'deeper'}")
    assert result.code == 2
    assert "it cannot be written (Not a directory)" in result.lines()[-1]
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert run(f"export.dir={tmp_path / 'other' / 'deeper'}", "report.enabled=false").code == 0


def test_a_tokenizer_that_comes_back_as_another_is_refused_or_insisted_on(run, tmp_path, monkeypatch):
    """As of a tokenizer whose fast form was never saved with its added tokens."""
    read = tokenizer_files.AutoTokenizer.from_pretrained

    def one_more(directory):
        tokenizer = read(directory)
        tokenizer.add_tokens(["<|lost|>"])
        return tokenizer

    monkeypatch.setattr(tokenizer_files, "AutoTokenizer", SimpleNamespace(from_pretrained=one_more))
    result = run()
    assert result.code == 2
    assert "1 tokens have other ids, ['<|lost|>']" in result.lines()[-1]
    assert "export.insist=true" in result.lines()[-1]
    assert not list((tmp_path / "run").glob(".partial-*"))
    result = run("export.insist=true", "report.enabled=false")
    assert result.code == 0
    assert sum("comes back as another one" in line for line in result.lines()) == 2


def test_names_that_no_reader_expects_are_refused(run, monkeypatch):
    shapes = rehearse.shapes_of
    monkeypatch.setattr(rehearse, "shapes_of", lambda model: {n: s for n, s in shapes(model).items() if "layers.1.mlp" not in n}
                        if model.device.type == "meta" else shapes(model))  # fmt: skip
    result = run()
    assert result.code == 2
    assert "3 tensor(s) of the export would not fit whoever reads it" in result.lines()[-1]


FAILURES = {
    "differs": ExportError("PEFT loads another model than was trained"),
    "full": OSError(28, "No space left on device"),
    "bug": RuntimeError("something else"),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_a_failed_export_loses_nothing_and_is_made_up_for(run, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(finish, "export", fails)
    result = run("method=lora", "data.validation_share=0.2", "evaluation.samples=1")
    assert result.code == 1
    assert "Traceback" not in result.err
    directory = tmp_path / "run"
    status = json.loads((directory / "status.json").read_text())
    summary = json.loads((directory / "summary.json").read_text())
    assert status["culprit"] == summary["export"]["error"]
    assert "the checkpoint of step 2" in status["culprit"]
    assert set(summary["eval"]["validation"]["tuned"]) == {"loss", "perplexity"}
    assert "the export failed" in (directory / "report.html").read_text()
    monkeypatch.undo()
    assert cli(["export", f"run.dir={directory}"]) == 0  # as the message says
    assert (directory / "export/adapter_model.safetensors").is_file()


def test_insisting_writes_what_differs_and_says_so(run, tmp_path, monkeypatch):
    from tritune.trainer.export import check

    monkeypatch.setattr(check, "FLOAT32", -1.0)  # nothing agrees
    result = run("report.enabled=false")
    assert result.code == 1
    assert "export.insist=true" in result.lines()[-1]
    directory = tmp_path / "run"
    assert not (directory / "export").exists()
    assert cli(["export", f"run.dir={directory}", "export.insist=true"]) == 0
    assert "does not give the trained model's logits" in (directory / "export/README.md").read_text()
    assert all(torch.isfinite(t).all() for t in load_file(directory / "export/model.safetensors").values())
