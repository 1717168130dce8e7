"""`report.html`: whatever state the run is in, it renders, is whole, shows the run's own figures and runs nothing."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import harness
import numpy as np
import pytest
import yaml
from tritune.launch.cli import main as cli
from tritune.trainer.config import Config
from tritune.trainer.config.compose import to_dict
from tritune.trainer.errors import InputError
from tritune.trainer.evaluation.abstention import settle
from tritune.trainer.objectives.language_model import LanguageModel
from tritune.trainer.objectives.loss import Loss
from tritune.trainer.report import write_report

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, whether every tag is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"  # noqa: PT018
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)


def check(path: Path) -> Page:
    """The page of a run; self-contained, with nothing that runs."""
    page = Page(path.read_text(encoding="utf-8"))
    names = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "svg"} & set(names)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "javascript:" not in value
            if name in ("src", "href", "srcset", "action", "data", "poster", "background"):
                assert value.startswith("data:image/svg+xml;base64,"), (tag, name, value[:40])
            if name == "style":
                page.styles.append(value)
    assert not any("url(" in s or "@import" in s for s in page.styles)
    assert any(t == "meta" and a.get("name") == "viewport" and "width=device-width" in a["content"]
               for t, a in page.tags)  # fmt: skip
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert names.count("h1") == 1
    return page


@pytest.fixture
def reported(tiny) -> list[str]:
    return [o for o in tiny if not o.startswith(("report", "export"))] + [
        "data.test_share=0.2", "optim.lr=1e-2", "generate.max_new_tokens=12",
    ]  # fmt: skip


def test_a_finished_run_with_its_own_figures(tritune, reported, tmp_path):
    run = tmp_path / "my <b>run</b> & more"
    options = ["data.validation_share=0.1", "evaluation.every=2", "evaluation.samples=4", "export.form=full"]
    result = tritune(*reported, *options, f'run.dir="{run}"', "report.question='Does <i>it</i> work, or not?'")
    assert result.code == 0, result.err
    page, summary = check(run / "report.html"), json.loads((run / "summary.json").read_text())
    assert "Does <i>it</i> work, or not?" in page.text
    assert run.name in page.text
    rows = {tuple(c[:2]): c for c in page.cells}
    split = ""
    compared = 0
    for cells in page.cells:
        if len(cells) != 4 or cells[0] == "split":
            continue
        split = cells[0].partition(" ")[0] or split
        pair = summary["eval"][split]
        for cell, side in ((cells[2], "base"), (cells[3], "tuned")):  # four digits are shown
            assert float(cell.replace(",", "")) == pytest.approx(pair[side][cells[1]], rel=6e-4)
        compared += 1
    assert compared == sum(len(p["tuned"]) for p in summary["eval"].values()) == 4
    assert f"{summary['parameters']['trainable']:,} of {summary['parameters']['total']:,}" in page.text
    assert f"{summary['export']['num_bytes']:,} bytes" in page.text
    assert f"{summary['tokens']:,}" in page.text
    assert any(c[0] == "steps" and c[1] == "4" for c in rows.values())
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) >= 4
    assert all(a["alt"] for a in images)
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 4
    for sample in samples:
        for key in ("prompt", "base", "tuned", "reference"):
            assert sample[key] in page.text
    before = page.text
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "time": "2001-01-01T00:00:00+0000"}))  # another minute
    assert cli(["report", f'run.dir="{run}"']) == 0
    assert check(run / "report.html").text == before, "made anew, it says the same"


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 0))])
def test_another_number_of_samples_when_a_run_goes_on(tritune, reported, tmp_path, count):
    """It decides nothing about the curve, so it may change; base and tuned must still stand beside the same rows."""
    reported = [*reported, "train.max_steps=2", f"run.dir={tmp_path}"]
    assert tritune(*reported, "evaluation.samples=4").code == 0
    first = json.loads((tmp_path / "samples.json").read_text())
    result = tritune(*reported, f"evaluation.samples={count}")
    assert result.code == 0, result.err
    said = {s["prompt"]: s["base"] for s in first}
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == count
    assert all(s["tuned"] is not None for s in samples)
    assert [s["prompt"] for s in samples if s["base"] not in (None, said.get(s["prompt"]))] == []
    check(tmp_path / "report.html")


@pytest.mark.parametrize(
    "objective", ["sft", *(pytest.param(o, marks=pytest.mark.slow) for o in ("classify", "pretrain"))]
)
def test_what_comes_from_data_and_model_is_escaped(tritune, reported, tmp_path, objective):
    data = tmp_path / f"{EVIL.replace('/', '')}.jsonl"
    rows = {
        "sft": [{"prompt": f"{EVIL} {i}", "response": f"</p>{EVIL}<|im_end|>\"' {i}"} for i in range(60)],
        "classify": [{"text": f"{EVIL} {i % 2} {i}", "label": [EVIL, '" onload="x'][i % 2]} for i in range(60)],
        "pretrain": [{"text": f"{EVIL} and </pre></body> {i}" * 20} for i in range(60)],
    }[objective]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [o for o in reported if not o.startswith("data.train")] + [
        f"objective={objective}",
        f"data.train='{data}'",
    ]
    result = tritune(*options, "train.max_steps=2", f"run.dir={tmp_path / 'run'}", f"report.question='{EVIL}'")
    assert result.code == 0, result.err
    page = check(tmp_path / "run" / "report.html")
    assert page.text.count("<script>alert(1)") >= 3
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in text.lower()
    assert (tmp_path / "run" / "samples.json").stat().st_size > 10


def test_accuracy_over_coverage(tmp_path):
    """The table's cells by their definition; without a classifier there is no such part."""
    rng = np.random.default_rng(5)
    confidence = rng.random(400)
    splits = {
        "validation": (confidence, rng.random(400) < confidence),
        "test": (confidence, rng.random(400) < confidence),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    for target, words in ((0.7, "It abstains below"), (0.9999, "No threshold makes"), (None, "evaluation.abstain=")):
        abstain = (
            settle({"validation": (confidence, confidence > 2)}, target) if target == 0.9999 else settle(splits, target)
        )
        (tmp_path / "summary.json").write_text(json.dumps({"abstain": abstain}))
        write_report(tmp_path)
        page = check(tmp_path / "report.html")
        assert words in page.text
        assert [a["alt"] for t, a in page.tags if t == "img"] == ["Accuracy over coverage"]
        [head] = [c for c in page.cells if c[0] == "split" and "95%" in c]
        for name, (sure, right) in splits.items() if target != 0.9999 else ():
            [row] = [c for c in page.cells if c[0] == name and len(c) == len(head)]
            order = np.argsort(-sure)
            shares = [float(share.rstrip("%")) / 100 for share in head[1:]]
            assert row[1:] == [f"{right[order[: round(400 * share)]].mean():.1%}" for share in shares]
    (tmp_path / "summary.json").write_text(json.dumps({"abstain": None}))
    write_report(tmp_path)
    assert "over coverage" not in check(tmp_path / "report.html").text


def test_a_stopped_run(tritune, reported, tmp_path, stop_at):
    stop_at(2)
    assert tritune(*reported, f"run.dir={tmp_path}").code == 75
    assert cli(["report", f"run.dir={tmp_path}"]) == 0
    page = check(tmp_path / "report.html")
    assert "stopped" in page.text
    assert "step 2" in page.text
    assert "(not yet)" in page.text
    assert "Base against tuned" not in page.text


@pytest.mark.parametrize("broken_at", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_failed_run(tritune, reported, tmp_path, monkeypatch, broken_at):
    """Its loss was never a number, or stopped being one."""
    whole = LanguageModel.__call__

    def poisoned(self, model, batch):
        loss = whole(self, model, batch)
        return Loss({"nll": loss.terms["nll"] * float("nan")}) if batch.step >= broken_at else loss

    monkeypatch.setattr(LanguageModel, "__call__", poisoned)
    result = tritune(*reported, "train.max_nonfinite=2", "train.max_steps=9", f"run.dir={tmp_path}")
    assert result.code == 1
    assert [r["loss"] is None for r in harness.rows(tmp_path)][-1]
    assert cli(["report", f"run.dir={tmp_path}"]) == 0
    assert "failed" in check(tmp_path / "report.html").text


def test_a_run_whose_result_is_not_a_number(tritune, reported, tmp_path):
    """JSON has null there: report, and the card of an export made later."""
    assert tritune(*reported, f"run.dir={tmp_path}").code == 0
    path = tmp_path / "summary.json"
    summary = json.loads(path.read_text())
    for side in ("base", "tuned"):
        summary["eval"]["test"][side] = dict.fromkeys(summary["eval"]["test"][side])
    path.write_text(json.dumps(summary))
    assert cli(["report", f"run.dir={tmp_path}"]) == 0
    check(tmp_path / "report.html")
    assert cli(["export", f"run.dir={tmp_path}", f"export.dir={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "README.md").is_file()


# -- directories made by hand: what a kill or a full disk leaves ------------------------------------------


def bare_run(directory: Path, **files) -> Path:
    config = Config()
    config.model.path, config.data.train, config.run.dir = "org/model", "rows.jsonl", str(directory)
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    for name, content in files.items():
        (directory / name.replace("_jsonl", ".jsonl").replace("_json", ".json")).write_text(content)
    return directory


def metrics(count: int, **changes) -> str:
    row = {"loss": 1.5, "grad_norm": 0.5, "lr": 1e-3, "tokens": 10, "label_tokens": 5, "epoch": 0,
           "tokens_per_second": 1e4, "memory_gib": 0.5}  # fmt: skip
    return "".join(
        json.dumps({"step": s, **row, "loss": 2 + math.sin(s / 99), **changes}) + "\n" for s in range(1, count + 1)
    )


STATUS = json.dumps({"state": "training", "step": 3, "time": "2026-11-21T10:00:00Z", "pid": 1})
CASES = {
    "config alone": {},
    "empty logs": {"metrics_jsonl": "", "evaluations_jsonl": "", "status_json": STATUS},
    "no status": {"metrics_jsonl": metrics(3)},
    "one row": {"metrics_jsonl": metrics(1), "status_json": STATUS},
    "every loss null": {"metrics_jsonl": metrics(5, loss=None, grad_norm=None), "status_json": STATUS},
    "some null": {"metrics_jsonl": metrics(5) + metrics(1, loss=None, grad_norm=None), "status_json": STATUS},
    "rates null": {"metrics_jsonl": metrics(3, tokens_per_second=None, memory_gib=None), "status_json": STATUS},
    "zeros": {"metrics_jsonl": metrics(3, loss=0.0, grad_norm=0.0, lr=0.0, memory_gib=0.0), "status_json": STATUS},
    "cut row": {"metrics_jsonl": metrics(3) + '{"step": 4, "lo', "status_json": STATUS},
    "51 steps": {"metrics_jsonl": metrics(51), "status_json": STATUS},
    "null evaluations": {"metrics_jsonl": metrics(3), "status_json": STATUS,
                         "evaluations_jsonl": '{"step": 1, "loss": null, "accuracy": null}\n'},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_run_left(tmp_path, case):
    page = check(write_report(bare_run(tmp_path / "run", **CASES[case])))
    assert "What does every parameter on rows.jsonl make of model?" in page.text
    assert not list((tmp_path / "run").glob(".report*"))


def test_each_sources_loss(tmp_path):
    names = ["_web$1$", *"abcdefghijk"]
    rows = metrics(60, **{f"loss/{name}": 1.0 + i for i, name in enumerate(names)})
    page = check(write_report(bare_run(tmp_path / "run", metrics_jsonl=rows, status_json=STATUS)))
    pictures = {a["alt"]: a["src"] for tag, a in page.tags if tag == "img"}
    svg = base64.b64decode(pictures["Training loss by step, of each source"].partition(",")[2]).decode()
    assert len(set(re.findall(r"stroke: (#\w{6})", svg))) >= 10
    (tmp_path / "other").mkdir()
    page = check(write_report(bare_run(tmp_path / "other" / "run", metrics_jsonl=metrics(60), status_json=STATUS)))
    assert not [a for tag, a in page.tags if tag == "img" and "source" in a["alt"]]


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="no run"):
        write_report(tmp_path)
    assert cli(["report", f"run.dir={tmp_path}"]) == 2
    assert cli(["report"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_hundred_thousand_steps(tmp_path):
    evaluations = "".join(f'{{"step": {s}, "loss": 1.5, "accuracy": 0.5}}\n' for s in range(10, 100_001, 10))
    run = bare_run(tmp_path / "run", metrics_jsonl=metrics(100_000), evaluations_jsonl=evaluations, status_json=STATUS)
    write_report(bare_run(tmp_path / "small", metrics_jsonl=metrics(5), status_json=STATUS))  # imports
    began = time.process_time()
    path = write_report(run)
    assert time.process_time() - began < 10
    assert path.stat().st_size < 2_000_000
    check(path)
