"""What `make demo` generates: the same everywhere, honest splits, a tokenizer that loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from tritune.launch.quickstart import __main__ as quickstart
from tritune.launch.quickstart.corpus import FAMILIES, MATTERS, paragraphs
from tritune.launch.quickstart.grammar import CATEGORIES, ITEMS, REPLIES, SPLITS, rows
from tritune.launch.quickstart.messages import MESSAGES
from tritune.launch.quickstart.tokenizer import VOCAB_SIZE, train_tokenizer
from tritune.trainer.config.compose import load_config
from tritune.trainer.model.chat_templates import CHATML


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {split: list(rows(split, seed=0)) for split in SPLITS}


def words(text: str) -> list[str]:
    """What is left of a template or message without slots, case and punctuation."""
    return re.sub(r"[^a-z ]", "", re.sub(r"{\w+}", "", text).lower()).split()


def test_generates_the_same_in_every_process():
    """Sets and hashes would differ between processes; the order of dicts and `random.Random` do not."""
    code = (
        "import hashlib, json\n"
        "from tritune.launch.quickstart.corpus import paragraphs\n"
        "from tritune.launch.quickstart.grammar import rows\n"
        "made = [*rows('train', 0), *rows('test', 0), *paragraphs(200, 0)]\n"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    made = [*rows("train", 0), *rows("test", 0), *paragraphs(200, 0)]
    here = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=60
        )
        assert out.stdout.strip() == here, out.stderr
    assert list(paragraphs(20, 0)) != list(paragraphs(20, 1))
    assert list(rows("train", 0)) != list(rows("train", 1))


def test_no_template_serves_two_splits_and_none_is_a_one_word_edit():
    """Nearness is the share of words that two templates of different splits have in common."""
    for category in CATEGORIES:
        held_out = [(split, t) for split in ("validation", "test") for t in MESSAGES[category][split]]
        for split, template in held_out:
            for other_split in SPLITS:
                for other in MESSAGES[category][other_split] if other_split != split else []:
                    a, b = set(words(template)), set(words(other))
                    assert len(a & b) / len(a | b) < 0.6, f"{template!r} of {split} is near {other!r} of {other_split}"
    every = [t for splits in MESSAGES.values() for templates in splits.values() for t in templates]
    assert len({tuple(words(t)) for t in every}) == len(every)


def runs(text: str, length: int = 6) -> set[tuple[str, ...]]:
    """Every `length` words in a row of a text; none reaches over a slot."""
    parts = [words(part) for part in re.split(r"{\w+}", text)]
    return {tuple(part[i : i + length]) for part in parts for i in range(len(part) - length + 1)}


def test_no_held_out_sentence_was_read_before():
    """Six words in a row of a test template stand neither in the corpus nor in a training template."""
    read = {run for text in paragraphs(3000, 0) for run in runs(text)}
    read |= {run for splits in MESSAGES.values() for template in splits["train"] for run in runs(template)}
    held_out = [template for splits in MESSAGES.values() for template in splits["test"]]
    assert len([t for t in held_out if runs(t)]) > 30
    for template in held_out:
        assert not runs(template) & read, f"{template!r}: {runs(template) & read}"


def test_every_template_names_the_thing_and_there_are_enough():
    for category in CATEGORIES:
        counts = {split: len(templates) for split, templates in MESSAGES[category].items()}
        assert counts["train"] >= 16
        assert counts["validation"] >= 5
        assert counts["test"] >= 6
        assert all("{item}" in t for templates in MESSAGES[category].values() for t in templates)


def test_rows_of_a_split(splits):
    for split, made in splits.items():
        assert len(made) == SPLITS[split]
        assert len({row["prompt"] for row in made}) == len(made)
        found = [row["response"].split("\n")[0] for row in made]
        assert {category: found.count(category) for category in found} == dict.fromkeys(CATEGORIES, len(made) // 8)
        assert found != sorted(found, key=CATEGORIES.index)
        for row, category in zip(made, found, strict=True):
            assert "{" not in row["prompt"] + row["response"]
            (item,) = [item for item in ITEMS if re.search(rf"\b{item}\b", row["prompt"])]
            assert row["response"] == f"{category}\n{REPLIES[category].format(item=item)}"


def test_no_message_stands_in_two_splits(splits):
    train, validation, test = ({row["prompt"] for row in splits[split]} for split in SPLITS)
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_the_corpus_is_no_support_message_and_has_no_chat(splits):
    corpus = list(paragraphs(500, 0))
    text = "\n".join(corpus)
    assert "<|" not in text
    assert not any(row["prompt"] in text or row["response"] in text for made in splits.values() for row in made)
    assert not re.search(r"[\[\]{}|]", text)
    assert FAMILIES.keys() == MATTERS.keys()
    assert not set(corpus) & set(paragraphs(500, 2))


def test_tokenizer(tmp_path, splits):
    from transformers import AutoTokenizer

    texts = [text for row in splits["train"] for text in row.values()] + list(paragraphs(1000, 0))
    train_tokenizer(texts, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    strange = ["Grüße, 東京! 👩‍👩‍👧 🚚", " \t\n\n  x ", "﷽ e\u0301 \x00", "don't 12,345.67"]
    for text in [*strange, *texts[:200], *(row["prompt"] for row in splits["test"])]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    for token in ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    for category in CATEGORIES:  # what the answer begins with is one decision, equally long for all
        assert len(tokenizer(category, add_special_tokens=False)["input_ids"]) == 1


def test_both_commands_compose(tmp_path):
    base, tuned = quickstart.commands(tmp_path, ["seed=1"])
    assert base[0] == tuned[0] == "train"
    first, second = load_config(base[1:], None), load_config(tuned[1:], None)
    assert (first.objective.name, first.method.name, first.seed) == ("pretrain", "full", 0)
    assert (second.objective.name, second.method.name, second.seed) == ("sft", "lora", 1)
    assert second.model.path == f"{first.run.dir}/export"
    assert second.data.retention == first.data.test
    assert second.evaluation.base
    assert first.backend.device == second.backend.device == "cpu"
    assert max(first.data.max_length, second.data.max_length) <= first.model.config["max_position_embeddings"]


def test_writes_what_the_commands_read(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "CORPUS", {name: (20, seed) for name, (_, seed) in quickstart.CORPUS.items()})
    quickstart.write_data(tmp_path / "data")
    train_tokenizer(quickstart.texts(tmp_path / "data"), tmp_path / "tokenizer")
    for arguments in quickstart.commands(tmp_path, []):
        for argument in arguments[2:]:
            key, _, value = argument.partition("=")
            if key.startswith("data.") or key == "model.tokenizer":
                assert (tmp_path / value).exists(), argument
    learned = set(quickstart.texts(tmp_path / "data"))
    assert not learned & {row["prompt"] for row in rows("test", 0)}
    assert not learned & set(paragraphs(20, quickstart.CORPUS["test"][1]))


@pytest.mark.slow
def test_the_demo_shows_what_fine_tuning_is_for(tmp_path):
    """All of `make demo`, and the question that the README asks afterwards."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "tritune.launch.quickstart"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, env=environment)
    assert out.returncode == 0, out.stderr
    tuned = tmp_path / "runs" / "quickstart" / "tuned"
    found = json.loads((tuned / "summary.json").read_text())["eval"]
    assert found["test"]["tuned"]["accuracy"] >= 0.9
    assert found["test"]["base"]["accuracy"] < 0.3, "chance is 0.125; four bases of different seeds had 0.12 to 0.24"
    assert found["retention"]["tuned"]["loss"] > found["retention"]["base"]["loss"], "the demo says that it forgets"
    samples = json.loads((tuned / "samples.json").read_text())
    assert len(samples) == 8
    assert all(sample["base"] and sample["tuned"] for sample in samples)
    page = (tuned / "report.html").read_text()
    assert samples[0]["tuned"].splitlines()[0] in page
    assert "<script" not in page
    asked = [sys.executable, "-m", "tritune.launch.cli", "generate", "run.dir=runs/quickstart/tuned",
             "--prompt", "When will the kettle that I ordered arrive?"]  # fmt: skip
    out = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["answers"][0]["text"].split("\n")[0] == "delivery"
