"""`evaluation.choices`: the likeliest of a few answers, judged by plain transformers in float64."""

from __future__ import annotations

import json
import random
from pathlib import Path

import harness
import pytest
import torch
from encoded import conversations
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from tritune.trainer.backends.local import Local
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.data.kinds import Record
from tritune.trainer.errors import InputError
from tritune.trainer.evaluation.choices import choose, lay_out
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer
from tritune.trainer.parallel.distributed import start
from tritune.trainer.parallel.mesh import make_mesh

CHOICES = ["red", "green", "a very light blue", "no"]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions with an answer that begins with one of the choices, and sometimes goes on."""
    rng = random.Random(seed)
    words = "sky sea sun moon grass lake stone snow".split()  # noqa: SIM905
    found = []
    for i in range(count):
        answer = rng.choice(CHOICES) + rng.choice(["", ", of course", "."])
        found.append({"prompt": f"{i}: the {' '.join(rng.choices(words, k=rng.randint(1, 9)))}?", "response": answer})
    return found


def right(row: dict[str, str]) -> int:
    return next(c for c, choice in enumerate(CHOICES) if row["response"].startswith(choice))


@torch.no_grad()
def brute_force(model, tokenizer, given: list[dict[str, str]]) -> list[int]:
    """One row and one choice at a time: the sum of log p over the choice's tokens, in float64."""
    model = model.double().eval()
    chosen = []
    for row in given:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        sums = []
        for choice in CHOICES:
            before = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = torch.tensor(tokenizer(text + choice, add_special_tokens=False)["input_ids"])
            log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_p[t - 1, ids[t]]) for t in range(before, len(ids))))
        ordered = sorted(sums)
        assert ordered[-1] - ordered[-2] > 1e-4, "a tie would be decided by rounding"
        chosen.append(max(range(len(CHOICES)), key=lambda c: sums[c]))
    return chosen


def random_model():
    settings = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
                "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))


def test_accuracy_is_brute_force():
    """Choices of one length, so that the random model has no favourite, and of several."""
    tokenizer, model, given = byte_tokenizer(), random_model(), rows(60)
    records = [Record(f"a:{i}", prompt=r["prompt"], response=r["response"]) for i, r in enumerate(given)]
    split = conversations(records, tokenizer, Config())
    choices = lay_out(split, CHOICES, tokenizer)
    assert choices.right.tolist() == [right(r) for r in given]
    backend = Local("single", make_mesh(BackendConfig(), start(BackendConfig(), False)))
    scorer = TokenScorer(model, None, 0, 64).eval()
    figures = {size: choose(scorer, choices, backend, size, 0) for size in (1, 7, 64)}
    chosen, truth = brute_force(model, tokenizer, given), [right(r) for r in given]
    assert len(set(chosen)) > 1, "a model that always says the same proves little"
    for found in figures.values():
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, chosen), abs=1e-12)
        assert found["macro_f1"] == pytest.approx(f1_score(truth, chosen, average="macro"), abs=1e-12)


@pytest.fixture
def chosen_run(tmp_path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows(90)))
    return [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={path}",
        "data.validation_share=0.3", "data.max_length=200", "train.batch_size=8", "train.max_steps=6",
        "evaluation.every=2", "evaluation.batch_size=16", "evaluation.samples=0", "optim.lr=1e-2", "train.use_best=true",
        f"evaluation.choices={CHOICES}", "evaluation.metric=accuracy", "backend.device=cpu", "report.enabled=false",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_runs_accuracy_is_brute_force_and_one_rank_equals_two(chosen_run, tmp_path):
    job = harness.run([*chosen_run, f"run.dir={tmp_path / 'one'}"], tmp_path / "logs")
    harness.run([*chosen_run, f"run.dir={tmp_path / 'two'}"], tmp_path / "logs", world_size=2)
    one, two = (harness.rows(tmp_path / name, "evaluations.jsonl") for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert {"accuracy", "macro_f1", "loss"} <= set(a)
        assert a["accuracy"] == b["accuracy"]
        assert a["macro_f1"] == b["macro_f1"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert summaries[0]["best"]["metric"] == "accuracy"
    assert summaries[0]["best"]["value"] == max(r["accuracy"] for r in one)
    assert summaries[0]["best"]["step"] == summaries[1]["best"]["step"]
    assert summaries[0]["tested_step"] == summaries[0]["best"]["step"]
    folder = tmp_path / "one" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = validation_rows(tmp_path / "rows.jsonl")
    chosen = brute_force(model, tokenizer, given)
    expected = accuracy_score([right(r) for r in given], chosen)
    assert summaries[0]["eval"]["validation"]["tuned"]["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert "accuracy" in job.output()


def validation_rows(path: Path) -> list[dict[str, str]]:
    """The split by the hash of the content, as README has it: below the share of [0, 1)."""
    import hashlib

    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        content = json.dumps([None, row["prompt"], row["response"], None], ensure_ascii=False, sort_keys=True)
        if int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64 < 0.3:
            found.append(row)
    assert 15 < len(found) < 40
    return found


@pytest.mark.parametrize("template", ["own", "chatml", "plain"])
@pytest.mark.parametrize("name", ["bytes", "stories260K", "tinystories-656k", "phi-3-mini"])
def test_choices_are_found_with_real_tokenizers(shared, name, template):
    """A Llama tokenizer puts a blank before a text by itself, which an answer inside a template does not begin with."""
    folder = shared / ("tokenizers" if name == "phi-3-mini" else "models") / name
    config = ModelConfig(tokenizer="bytes") if name == "bytes" else ModelConfig(path=str(folder))
    config.chat_template = "chatml" if template == "chatml" else None
    tokenizer = load_tokenizer(config)
    if template == "plain":
        tokenizer.chat_template = None
    elif not tokenizer.chat_template:
        pytest.skip("it has none")
    given = rows(12)
    records = [Record(f"a:{i}", prompt=r["prompt"], response=r["response"]) for i, r in enumerate(given)]
    split = conversations(records, tokenizer, Config())
    choices = lay_out(split, CHOICES, tokenizer)
    assert choices.right.tolist() == [right(r) for r in given]
    # Where the choice is the whole answer, its tokens are those that training put there.
    for i, row in enumerate(given):
        if row["response"] != CHOICES[right(row)]:
            continue
        n = i * len(CHOICES) + right(row)
        ids = choices.examples.ids(n)
        whole = split.ids(i)
        assert ids.tolist() == whole[: len(ids)].tolist()


def test_an_answer_with_no_choice_is_refused(tritune, chosen_run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + json.dumps({"prompt": "and this?", "response": "purple"}) + "\n")
    changed = [o for o in chosen_run if not o.startswith("data.validation_share")]
    leaky = "audit.fail_on=[]"  # the split is the training rows
    result = tritune(*changed, f"data.validation={path}", leaky, f"run.dir={tmp_path / 'run'}")
    assert result.code == 2
    assert "rows.jsonl:91" in result.err
    assert "purple" in result.err
    assert "a very light blue" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.choices=[]"], "evaluation.metric=accuracy"),
        (["objective=pretrain"], "evaluation.choices"),
        (["evaluation.choices=[red]"], "two or more"),
        (["evaluation.choices=[re,red]"], "none of which begins another"),
        (["evaluation.choices=[red,red]"], "none of which begins another"),
        (["evaluation.choices=['',red]"], "none of which begins another"),
    ],
)
def test_settings_that_make_no_sense(tritune, chosen_run, tmp_path, overrides, words):
    result = tritune(*chosen_run, *overrides, f"run.dir={tmp_path / 'run'}")
    assert result.code == 2
    assert words in result.err


def test_rows_that_tie_pick_the_first_and_lengths_are_not_divided_out():
    """No normalisation by length, as the module says: with a uniform model the shortest choice wins."""
    tokenizer, model = byte_tokenizer(), random_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    records = [Record(f"a:{i}", prompt="?", response=c) for i, c in enumerate(CHOICES)]
    choices = lay_out(conversations(records, tokenizer, Config()), CHOICES, tokenizer)
    backend = Local("single", make_mesh(BackendConfig(), start(BackendConfig(), False)))
    figures = choose(TokenScorer(model, None, 0, 64).eval(), choices, backend, 8, 0)
    assert figures["accuracy"] == 0.25
    assert choices.right.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="a:0"):
        lay_out(conversations([Record("a:0", prompt="?", response="blue")], tokenizer, Config()), CHOICES, tokenizer)
