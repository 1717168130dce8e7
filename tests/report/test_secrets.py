"""No secret reaches a run's directory, and the run can still go on afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from tritune.launch.cli import main as cli

TOKEN = "hf_AbC123dEf456GhI789jKl012MnO345pQr6"
PASSWORD = "pw123456"
ADDRESS = f"https://user:{PASSWORD}@host/data"


def leaks(run: Path) -> list[str]:
    """Files of the run that hold a secret, as bytes: configuration, logs, reports, cards, JSON of the exports."""
    files = [p for p in run.rglob("*") if p.is_file()]
    assert {"config.yaml", "environment.json", "train.log", "report.html", "README.md"} <= {p.name for p in files}
    return [str(p.relative_to(run)) for p in files
            if any(s.encode() in p.read_bytes() for s in (TOKEN, PASSWORD))]  # fmt: skip


@pytest.fixture
def secretive(tiny, label_file, monkeypatch) -> list[str]:
    """A run with secrets in the environment, in keys that make the run what it is, in the data's rows and in a label."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plain = [o for o in tiny if not o.startswith(("report", "export", "data.train"))]
    data = label_file.parent / "secret.jsonl"
    rows = [json.loads(line) for line in label_file.read_text().splitlines()[:60]]
    data.write_text("".join(json.dumps({**r, "text": f"{r['text']} {ADDRESS} {TOKEN}"}) + "\n" for r in rows))
    return [
        *plain, f"data.train={data}", "objective=classify_token", "data.max_length=256", "data.test_share=0.3",
        f"objective.prompt='{ADDRESS} {{text}} {TOKEN}'", f"report.question='Is it at {ADDRESS}?'",
        f"tracking.name='{ADDRESS}'", "export.form=full", "checkpoint.every=1", "evaluation.samples=3",
        "generate.max_new_tokens=8",
    ]  # fmt: skip


def test_nothing_leaks_and_the_run_goes_on(tritune, secretive, tmp_path, stop_at, capfd):
    stop_at(2)
    first = tritune(*secretive, f"run.dir={tmp_path}")
    assert first.code == 75, first.err
    second = tritune(*secretive, f"run.dir={tmp_path}")
    assert second.code == 0, second.err
    assert "resume" in second.err, "the identity check takes the same command for the same run"
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 4
    assert leaks(tmp_path) == []
    assert "***" in (tmp_path / "config.yaml").read_text()
    assert cli(["report", f"run.dir={tmp_path}"]) == 0
    assert cli(["export", f"run.dir={tmp_path}", f"export.dir={tmp_path / 'again'}"]) == 0
    assert leaks(tmp_path) == []
    assert TOKEN not in first.err + second.err
    assert PASSWORD not in first.err + second.err
    for folder in (
        tmp_path / "export",
        tmp_path / "again",
    ):  # nor is a prompt with `***` in it passed off for the run's
        card, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
        assert "held a secret" in card
        assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
        assert len(config["tritune_label_token_ids"]) == 3
        assert "tritune_prompt" not in config
        assert "***" not in AutoTokenizer.from_pretrained(folder).chat_template
    prompt = next(o for o in secretive if o.startswith("objective.prompt"))
    asks = ["generate", f"model.path={tmp_path / 'again'}", "--prompt", "red"]
    capfd.readouterr()
    assert cli(asks) == 2
    assert "objective.prompt" in capfd.readouterr().err
    stars = ["objective.prompt='*** Review *** {text} is'", f"export.dir={tmp_path / 'stars'}"]
    assert cli(["export", f"run.dir={tmp_path}", *stars]) == 0, "given anew, it is what it says"
    assert "*** Review ***" in AutoTokenizer.from_pretrained(tmp_path / "stars").chat_template
    capfd.readouterr()
    assert cli([*asks, "objective=classify_token", prompt]) == 0, "whoever knows the prompt gets a label"
    assert json.loads(capfd.readouterr().out)["answers"][0]["guess"] in {"blue", "green", "red"}


@pytest.mark.slow
def test_another_secret_is_not_another_run_but_another_value_is(tritune, secretive, tmp_path):
    assert tritune(*secretive, f"run.dir={tmp_path}").code == 0
    changed = [o.replace("{text}", "so {text}") for o in secretive]
    result = tritune(*changed, f"run.dir={tmp_path}")
    assert result.code == 2
    assert "objective.prompt" in result.err
    assert TOKEN not in result.err
    assert PASSWORD not in result.err


def test_a_failure_tells_no_secret(tritune, secretive, tmp_path, monkeypatch):
    """A library's exception may carry an address with a password: the traceback, the log, the status."""

    def fail(self, model, batch):
        raise RuntimeError(f"could not reach {ADDRESS} with {TOKEN}")

    monkeypatch.setattr("tritune.trainer.objectives.classes.Classes.__call__", fail)
    result = tritune(*secretive, f"run.dir={tmp_path}")
    assert result.code == 1
    assert "could not reach" in result.err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    for text in (result.err, *(p.read_text() for p in files)):
        assert TOKEN not in text
        assert PASSWORD not in text


@pytest.mark.slow
def test_evaluating_the_run_uses_the_prompt_it_was_trained_with_or_says_so(tritune, secretive, tmp_path, capfd):
    """`config.yaml` holds `***` where the prompt held a secret: figures of another prompt must not pass for the run's."""
    assert tritune(*secretive, f"run.dir={tmp_path}").code == 0
    capfd.readouterr()
    code = cli(["evaluate", f"run.dir={tmp_path}"])
    err = capfd.readouterr().err
    if code == 0:
        found = json.loads((tmp_path / "evaluation.json").read_text())["eval"]["test"]
        assert found == json.loads((tmp_path / "summary.json").read_text())["eval"]["test"]["tuned"]
    else:
        assert code == 2
        assert "***" in err
