"""`tritune evaluate` gives the figures that the run itself wrote, of whatever form the model is in."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import harness
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritune.launch.cli import main as cli

QUICK = ["backend.device=cpu", "report.enabled=false", "evaluation.samples=0", "optim.lr=1e-2", "optim.warmup_ratio=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 192)


def caller(capfd, verb: str):
    """Call the verb -> exit status, what it printed, what was said."""

    def call(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli([verb, *argv])
        out = capfd.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def evaluate(capfd):
    return caller(capfd, "evaluate")


@pytest.fixture
def ask(capfd):
    return caller(capfd, "generate")


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def figures(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())["eval"]


def tuned(run: Path) -> dict:
    return {split: pair["tuned"] for split, pair in summary(run)["eval"].items()}


@pytest.fixture
def kinds(sft_file, label_file, tmp_path) -> dict[str, list[str]]:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("\n\n".join(f"the cat number {i} sat on the mat and saw {i * 7} birds" for i in range(150)))
    other.write_text("\n\n".join(f"ZEBRAS RUN {i} MILES" for i in range(20)))
    sft = [f"data.train={sft_file}", "data.max_length=160", "data.test_share=0.2", "data.validation_share=0.1"]
    labels = [f"data.train={label_file}", "data.max_length=96", "data.test_share=0.2", "train.batch_size=16"]
    abstains = [*labels, "data.validation_share=0.2", "evaluation.abstain=0.6"]
    return {
        "sft full": [*sft, f"data.retention={other}"],
        "sft lora": [*sft, "method=lora", "method.rank=4", "method.bias=all", "data.retention=" + str(other)],
        "sft bfloat16": [*sft, "model.dtype=bfloat16"],
        "sft lora bfloat16": [*sft, "model.dtype=bfloat16", "method=lora", "method.rank=4"],
        "sft part bfloat16": [*sft, "model.dtype=bfloat16", "method.last_layers=1"],
        "classify adapter": [*labels, "objective=classify", "method=adapter", "method.size=8"],
        "classify full": [*abstains, "objective=classify"],
        "classify lora": [*labels, "objective=classify", "method=lora", "method.rank=4"],
        "classify_token": [*abstains, "objective=classify_token", "objective.prompt='Is it {text}? It is'"],
        "classify_token lora": [*abstains, "objective=classify_token", "objective.prompt='Is it {text}? It is'",
                                "method=lora", "method.rank=4"],
        "pretrain": ["objective=pretrain", f"data.train={text}", f"data.retention={other}", "data.validation_share=0.2",
                     "data.max_length=64"],
    }  # fmt: skip


def require_rows_give_the_figures(run: Path, by_token: bool) -> None:
    """`predictions.jsonl` has every row once, in the data's order, and its figures add up to those of the table."""
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for split, figure in figures(run).items():
        rows = [line for line in lines if line["split"] == split]
        assert len({(row["place"], row.get("input")) for row in rows}) == len(rows) > 0
        numbers = [int(re.findall(r"\d+", row["place"])[-1]) for row in rows]
        assert numbers == sorted(numbers)
        if "label" in rows[0]:
            losses = [-math.log(row["probabilities"][row["label"]]) for row in rows]
            mean = sum(losses) / len(rows)  # of six digits; by token the loss is over the whole vocabulary
            assert mean == pytest.approx(figure["loss"], abs=1e-5) or (by_token and mean < figure["loss"])
            assert sum(row["prediction"] == row["label"] for row in rows) / len(rows) == pytest.approx(
                figure["accuracy"]
            )
            assert all(row["label"] in row["input"] for row in rows)
            assert all(max(row["probabilities"].values()) == row["probability"] for row in rows)
            require_the_same_coverage(run, split, rows, figure)
        else:
            tokens = sum(row["tokens"] for row in rows)
            assert sum(row["loss"] * row["tokens"] for row in rows) / tokens == pytest.approx(figure["loss"], rel=1e-9)
            assert all(row["reference"] for row in rows)


def require_the_same_coverage(run: Path, split: str, rows: list[dict], figure: dict) -> None:
    """Who is abstained on, and how often the others are right, is what the threshold in the run's summary says."""
    abstain = summary(run)["abstain"]
    assert abstain["curves"][split][-1] == [1.0, pytest.approx(figure["accuracy"]), pytest.approx(0.5, abs=0.5)]
    if abstain["below"] is None:
        assert not any(row["abstained"] for row in rows)
        assert "coverage" not in figure
        return
    answered = [row for row in rows if not row["abstained"]]
    assert all((row["probability"] >= abstain["below"]) != row["abstained"] for row in rows)
    assert 0 < len(answered) == round(figure["coverage"] * len(rows))
    right = sum(row["prediction"] == row["label"] for row in answered) / len(answered)
    assert right == pytest.approx(figure["answered_accuracy"])
    if split == "validation":
        assert abstain["target"] <= right
        assert len(answered) < len(rows), "a threshold that refuses nobody proves nothing"


def require_an_export_that_says_what_it_is(ask, run: Path, adapter: bool) -> None:
    """A classifier by token: other tools read its labels, render its prompt and load it; the card's own lines give its label."""
    for folder in [run / "export", *([run / "merged"] if adapter else [])]:
        beside = adapter and folder.name == "export"
        if not beside:
            config = AutoModelForCausalLM.from_pretrained(folder).config
            assert config.id2label == {0: "blue", 1: "green", 2: "red"}
            assert config.label2id == {"blue": 0, "green": 1, "red": 2}
            said = {key: getattr(config, key) for key in vars(config) if key.startswith("tritune_")}
        else:
            assert json.loads((folder / "labels.json").read_text()) == ["blue", "green", "red"]
            said = json.loads((folder / "tritune.json").read_text())
        assert said["tritune_prompt"] == "Is it {text}? It is"
        assert said["tritune_abstain_below"] == summary(run)["abstain"]["below"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "old hat"}], tokenize=False)
        assert rendered == "<bos>Is it old hat? It is"
        card = (folder / "README.md").read_text()
        assert '"Is it {text}? It is"' in card
        assert f"below {summary(run)['abstain']['below']:.6g}" in card
        lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("...", "old hat 7")
        names: dict = {}
        base = yaml.safe_load((run / "config.yaml").read_text())["model"]["path"]
        lines = lines.replace('from_pretrained("base', f'from_pretrained("{Path(base).parent}/base')
        exec(lines.replace('"."', repr(str(folder))).replace('open("', f'open("{folder}/'), names)
        code, out, err = ask(f"model.path={folder}", "--prompt", "old hat 7", "backend.device=cpu")
        assert code == 0, err
        [answer] = json.loads(out)["answers"]
        assert answer["guess"] == names["label"]
        assert answer["probability"] == pytest.approx(names["probabilities"].detach().max().item(), abs=2e-6)
    refused = not answer["abstained"]
    code, out, err = ask(
        f"model.path={folder}",
        "--prompt",
        "old hat 7",
        f"evaluation.abstain_below={int(refused)}",
        "backend.device=cpu",
    )
    assert code == 0, err
    label = None if refused else answer["guess"]
    assert json.loads(out)["answers"] == [{**answer, "text": label, "abstained": refused}]
    code, out, err = ask(f"model.path={folder}", "--prompt", "x", "data.labels=[red,blue,green]", "backend.device=cpu")
    assert (code, out) == (2, "")
    assert "tritune_label_token_ids" in err
    assert "Leave out data.labels" in err


def require_the_same_labels(ask, run: Path, kind: str) -> None:
    """A classifier that is asked through `generate` says what it said of the same texts in the test split."""
    told = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()][:20]
    asked = run / "asked.jsonl"
    texts = [re.search(r"(?:Is it )?(.*?)(?:\? It is)?$", row["input"].strip())[1] for row in told]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    bad = ['{"text": null}', '{"other": "x"}', '{"text": " "}', '{"text": ']
    asked.write_text("\n".join([*lines, *bad, json.dumps({"text": "far too long " * 100})]) + "\n")
    where = [[f"run.dir={run}"], [f"model.path={run / 'export'}"]]
    if not kind.startswith("classify_token"):
        where[1] += ["objective=classify"]
    for open_it in where:
        code, out, err = ask(*open_it, f"generate.file={asked}", "backend.device=cpu", "data.max_length=96")
        assert code == 0, err
        said = [json.loads(line) for line in out.splitlines()]
        assert [row["answers"][0]["guess"] for row in said[:20]] == [row["prediction"] for row in told]
        assert [row["answers"][0]["abstained"] for row in said[:20]] == [row["abstained"] for row in told]
        assert all(a["text"] == (None if a["abstained"] else a["guess"]) for r in said[:20] for a in r["answers"])
        assert [row["answers"][0]["probability"] for row in said[:20]] == pytest.approx(
            [r["probability"] for r in told], abs=2e-6
        )
        assert [bool(row.get("error")) for row in said] == [False] * 20 + [True] * 4 + [False]
        assert [row.get("id") for row in said[:20]] == list(range(20))
        assert "4 of 25 prompts have no answer. The first: " in err
        assert f"{asked}:21" in err
    code, out, err = ask(where[0][0], "--prompt", " ", "backend.device=cpu")
    assert (code, out) == (2, "")
    assert "the text is empty" in err


FAST = ["sft lora", "classify_token lora"]
SLOW = [
    "classify_token",
    "sft full",
    "classify full",
    "sft bfloat16",
    "sft lora bfloat16",
    "classify lora",
    "pretrain",
    "sft part bfloat16",
    "classify adapter",
]


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_a_run_evaluated_again_gives_what_it_wrote(tritune, evaluate, ask, kinds, base, tmp_path, kind):
    """To the last bit, with the splits cut again from the training file; and so do its export and its base."""
    run = tmp_path / "run"
    options = [*QUICK, *kinds[kind], f"model.path={base}", "train.max_steps=6", "train.batch_size=8"]
    result = tritune(*options, f"run.dir={run}")
    assert result.code == 0, result.err
    code, table, err = evaluate(f"run.dir={run}")
    assert code == 0, err
    assert figures(run) == tuned(run)
    require_rows_give_the_figures(run, by_token=kind.startswith("classify_token"))
    assert json.loads((run / "evaluation.json").read_text())["step"] == 6
    before = json.loads((run / "base.json").read_text())
    for split, found in tuned(run).items():
        assert found["loss"] != before[split]["loss"], "training must have changed what is compared"
        assert f"{found['loss']:,.4f}" in table
        assert split in table
    # The export by itself: no run, only its folder and the data.
    data = [o for o in options if o.startswith(("data.", "objective", "model.dtype", "backend"))]
    code, table, err = evaluate(f"model.path={run / 'export'}", *data)
    assert code == 0, err
    if "bfloat16" not in kind:
        assert all(f"{value:,.4f}" in table for found in tuned(run).values() for value in found.values())
    # The base by itself is what the run scored before its first step.
    if kind.startswith("classify"):
        require_the_same_labels(ask, run, kind)
    if kind.startswith("classify_token"):
        adapter = kind.endswith("lora")
        if adapter:
            assert cli(["export", f"run.dir={run}", "export.form=merged", f"export.dir={run / 'merged'}"]) == 0
        require_an_export_that_says_what_it_is(ask, run, adapter)
    if not kind.startswith("classify "):  # its head was random then
        code, table, err = evaluate(f"model.path={base}", *data)
        assert code == 0, err
        assert all(f"{value:,.4f}" in table for found in before.values() for value in found.values())


def test_the_loss_of_a_split_by_hand(tritune, evaluate, kinds, base, tmp_path):
    """Transformers' own loss over the answers of a test file: the judge of all the figures above."""
    rows = [{"prompt": f"{i} and {i}?", "response": f"That is {2 * i}."} for i in range(12)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = tmp_path / "run"
    options = [*QUICK, kinds["sft full"][0], "data.max_length=160", f"model.path={base}", "train.max_steps=6"]
    assert tritune(*options, "train.batch_size=8", f"run.dir={run}").code == 0
    code, _, err = evaluate(f"run.dir={run}", f"data.test={test}")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(run / "export").double()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    total, count = 0.0, 0
    for row in rows:
        talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        before = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
        answer = row["response"] + "<|im_end|>"
        ids = torch.tensor(tokenizer(before + answer, add_special_tokens=False)["input_ids"])
        n = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[t - 1, ids[t]]) for t in range(n, len(ids)))
        count += len(ids) - n
    assert figures(run)["test"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_steps_and_the_best(tritune, evaluate, kinds, base, tmp_path):
    """A rate that wrecks the model: the best checkpoint is an early one, `checkpoint.step` names any other."""
    run = tmp_path / "run"
    options = [*QUICK, *kinds["sft full"][:4], f"model.path={base}", "train.batch_size=8", "evaluation.every=2"]
    options += ["optim.lr=2", "optim.schedule=constant", "optim.warmup_steps=9", "train.use_best=true"]
    result = tritune(*options, "train.max_steps=12", "checkpoint.keep_last=9", f"run.dir={run}")
    assert result.code == 0, result.err
    best = summary(run)["tested_step"]
    assert best < 12
    code, _, err = evaluate(f"run.dir={run}")
    assert code == 0, err
    assert json.loads((run / "evaluation.json").read_text())["step"] == best
    assert figures(run) == tuned(run)
    at = {r["step"]: r for r in harness.rows(run, "evaluations.jsonl")}
    for step in (2, 12):
        assert evaluate(f"run.dir={run}", f"checkpoint.step={step}")[0] == 0
        assert json.loads((run / "evaluation.json").read_text())["step"] == step
        assert figures(run)["validation"]["loss"] == at[step]["loss"]
    assert evaluate(f"run.dir={run}", "train.use_best=false")[0] == 0
    assert figures(run)["validation"]["loss"] == at[12]["loss"]
    code, _, err = evaluate(f"run.dir={run}", "checkpoint.step=3")
    assert code == 2
    assert "checkpoint.step=3" in err
    assert "2, 4, 6" in err


@pytest.mark.slow
def test_a_stopped_run_is_evaluated_where_it_stopped(tritune, evaluate, kinds, base, tmp_path, stop_at):
    run = tmp_path / "run"
    stop_at(3)
    options = [*QUICK, *kinds["sft full"][:4], f"model.path={base}", "train.batch_size=8", "train.max_steps=9"]
    assert tritune(*options, f"run.dir={run}").code == 75
    code, _, err = evaluate(f"run.dir={run}", "evaluation.splits=[test,train]")
    assert code == 0, err
    found = json.loads((run / "evaluation.json").read_text())
    assert found["step"] == 3
    assert sorted(found["eval"]) == ["test", "train"]
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_other_rows_and_overrides(tritune, evaluate, kinds, base, sft_file, tmp_path):
    """A new test file in place of the share; the run's own files are left as they were but for what it writes."""
    run, new = tmp_path / "run", tmp_path / "new.jsonl"
    new.write_text("\n".join(sft_file.read_text().splitlines()[:9]))
    options = [*QUICK, *kinds["sft full"][:4], f"model.path={base}", "train.batch_size=8", "train.max_steps=2"]
    assert tritune(*options, f"run.dir={run}").code == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, table, err = evaluate(f"run.dir={run}", f"data.test={new}", "data.test_share=0", "evaluation.splits=[test]")
    assert code == 0, err
    assert "test (9 rows)" in table
    assert list(figures(run)) == ["test"]
    assert {p: p.read_bytes() for p in before} == before
    assert {p for p in run.rglob("*") if p.is_file()} - set(before) == {
        run / "evaluation.json",
        run / "predictions.jsonl",
    }


def test_refusals(tritune, evaluate, kinds, base, tmp_path):
    run = tmp_path / "run"
    options = [*QUICK, kinds["sft full"][0], "data.max_length=160", f"model.path={base}", "train.batch_size=8"]
    assert tritune(*options, "train.max_steps=1", f"run.dir={run}").code == 0
    test = options[len(QUICK)].replace("data.train=", "data.test=")
    for argv, words in (
        ((f"run.dir={tmp_path}",), "it holds no run"),
        ((f"run.dir={tmp_path / 'absent'}",), "it holds no run"),
        ((f"run.dir={run}", f"model.adapter={base}"), "names what is read as well"),
        ((f"run.dir={run}", "method=lora"), "method=lora: the run has a whole configuration"),
        ((f"run.dir={run}", "objective=pretrain"), "Override single keys"),
        ((f"run.dir={run}", "experiment=banking77"), "Override single keys"),
        ((f"run.dir={run}", "model=tiny"), "model"),
        ((f"run.dir={run}",), "evaluation.splits"),  # the run has no held-out split
        ((f"model.path={base}",), "evaluation.splits"),
        ((f"model.path={base}", "data.test=absent.jsonl"), "does not exist"),
        ((f"model.path={base}", test, "evaluation.splits=[tset]"), "no split tset"),
        ((test,), "model.path"),
        (
            (f"model.path={base}", kinds["classify full"][0].replace("train", "test"), "objective=classify"),
            "random head",
        ),
        ((f"model.path={base}", test, "data.max_length=1000"), "context of 192"),
    ):
        code, out, err = evaluate(*argv)
        assert (code, out) == (2, ""), (argv, err)
        assert words in err, (argv, err)
        assert "Traceback" not in err
    assert not (run / "evaluation.json").exists()


@pytest.mark.slow
def test_a_run_without_a_checkpoint(tritune, evaluate, kinds, base, tmp_path):
    import shutil

    run = tmp_path / "run"
    options = [*QUICK, *kinds["sft full"][:4], f"model.path={base}", "train.batch_size=8", "train.max_steps=1"]
    assert tritune(*options, f"run.dir={run}").code == 0
    shutil.rmtree(run / "checkpoints")
    for extra in ([], ["train.use_best=true"], ["checkpoint.step=1"]):
        code, _, err = evaluate(f"run.dir={run}", *extra)
        assert code == 2, extra
        assert "checkpoint" in err
