"""What rows hold and nothing reads is said where a run starts, written to data.json and found by the audit, with counts."""

from __future__ import annotations

import json

import pytest
from options import learning
from tritune.trainer.config import Config
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.kinds import Reading, Record
from tritune.trainer.data.splits import read_splits
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.data.unread import MOST, KeyReader, Unread
from tritune.trainer.errors import EXIT_INPUT
from tritune.trainer.model.tokenizer import byte_tokenizer

ROWS = [
    {
        "id": number,
        "source": "forum",
        "notes": "words that somebody wrote" if number % 2 else None,
        "messages": [
            {"role": "user", "content": f"question {number}", "name": "Ada", "mood": "calm and kind"},
            {"role": "assistant", "content": f"answer {number}", "weight": number % 3 > 0},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": f"then {number}", "stamp": 3},
        ],
    }
    for number in range(12)
]
UNREAD = {
    "column id": 12,
    "column source": 12,
    "column notes": 6,
    "message key name": 12,
    "message key mood": 12,
    "message key stamp": 12,
}


@pytest.fixture
def chat_file(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_run_says_what_it_does_not_read(tritune, tiny, chat_file, tmp_path):
    run = tmp_path / "run"
    result = tritune(*tiny, f"data.train={chat_file}", f"run.dir={run}", "train.max_steps=1")
    assert result.code == 0, result.err
    said = [line for line in result.lines() if "not read" in line]
    for name, count in UNREAD.items():
        assert any(f"{name} in {count} {'message' if 'key' in name else 'row'}" in line for line in said), name
    report = json.loads((run / "data.json").read_text())["train"]
    assert report["unread"] == UNREAD
    assert report["unread_texts"] == {"column notes": 6, "message key mood": 12}
    assert report["columns"] == {"messages": "messages"}
    quiet = "data.ignore=[id,source,notes,name,mood,stamp]"
    result = tritune(*tiny, f"data.train={chat_file}", f"run.dir={run}2", "train.max_steps=1", quiet)
    assert result.code == 0, result.err
    assert "not read" not in result.err


def test_a_key_that_the_template_reads_is_read(chat_file, tmp_path):
    config = Config()
    config.cache.dir, config.data.train = str(tmp_path / "cache"), str(chat_file)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['name'] if message['name'] else '') + message['content']"
    )
    report = read_splits(config, tokenizer, None).examples["train"].report
    assert report.unread == {name: count for name, count in UNREAD.items() if name != "message key name"}


def test_turns_that_are_flagged_train_nothing(chat_file, tmp_path):
    """The weight of every third row's first answer is 0; what is trained is spelled out."""
    config = Config()
    config.cache.dir, config.data.train = str(tmp_path / "cache"), str(chat_file)
    tokenizer = byte_tokenizer()
    examples = read_splits(config, tokenizer, None).examples["train"]
    for row in range(len(examples)):
        trained = [tokenizer.decode(examples.ids(row)[a:b]) for a, b in examples.spans(row)]
        wanted = [f"answer {row}", f"then {row}"][0 if row % 3 else 1 :]
        assert [text.partition("<")[0] for text in trained] == wanted


def test_a_template_with_marks_trains_no_flagged_turn(chat_file, tmp_path):
    config = Config()
    config.cache.dir, config.data.train = str(tmp_path / "cache"), str(chat_file)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    examples = read_splits(config, tokenizer, None).examples["train"]
    assert [len(examples.spans(row)) for row in range(6)] == [1, 2, 2, 1, 2, 2]


def test_the_audit_finds_what_is_unread(capsys, chat_file, tmp_path):
    from tritune.trainer.audit.verb import main

    folder = tmp_path / "audit"
    assert main(["model=tiny", "objective=sft", f"data.train={chat_file}", f"audit.out={folder}"]) == 0
    found = [f for f in json.loads((folder / "audit.json").read_text())["findings"] if f["name"] == "unread"]
    assert {f["severity"] for f in found} == {"warning", "note"}
    counts = {name: count for f in found for name, count in f["details"]["unread"].items()}
    assert counts == UNREAD
    assert next(f for f in found if f["severity"] == "warning")["details"]["unread"].keys() == {
        "column notes",
        "message key mood",
    }
    strict = main(
        ["model=tiny", "objective=sft", f"data.train={chat_file}", f"audit.out={folder}", "audit.fail_on=[unread]"]
    )
    assert strict == EXIT_INPUT
    assert "data.ignore" in capsys.readouterr().err


def test_the_labels_that_look_alike_are_found(capsys, tmp_path):
    from tritune.trainer.audit.verb import main

    path = tmp_path / "labels.csv"
    labels = ["bad", "bad ", "Good", "good", "ﬁne", "fine", "caf\u00e9", "cafe\u0301", "other"]
    path.write_text(
        "text,label\n" + "".join(f"text {i} {j},{label}\n" for i, label in enumerate(labels) for j in range(2))
    )
    main(["model=tiny", "objective=classify", f"data.train={path}", f"audit.out={tmp_path / 'audit'}"])
    (found,) = [
        f
        for f in json.loads((tmp_path / "audit" / "audit.json").read_text())["findings"]
        if f["name"] == "similar_labels"
    ]
    assert found["details"]["labels"] == dict.fromkeys(labels[:-1], 2)
    assert found["severity"] == "warning"


def test_the_column_of_the_classes_is_said_where_others_could_be_meant(tritune, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {i}", "label": i % 3, "category": "ab"[i % 2]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*tiny, f"data.train={path}", "objective=classify", "train.max_steps=1"]
    result = tritune(*arguments, f"run.dir={tmp_path / 'one'}")
    assert "labels: 3 classes in column label, beside category; data.columns.label=category reads that" in result.err
    result = tritune(*arguments, f"run.dir={tmp_path / 'two'}", "data.columns.label=category")
    assert result.code == 0
    assert "beside" not in result.err
    assert len(json.loads((tmp_path / "two" / "data.json").read_text())["labels"]) == 2


def test_a_refused_start_leaves_no_folder(tritune, tiny, tmp_path):
    path, run = tmp_path / "rows.jsonl", tmp_path / "runs" / "one"
    path.write_text(json.dumps({"prompt": "q", "completion": "a", "label": False}) + "\n")
    result = tritune(*tiny, f"data.train={path}", f"run.dir={run}")
    assert result.code == EXIT_INPUT
    assert "good or bad" in result.err
    assert not run.exists()
    result = tritune(*tiny, f"data.train={path}", f"run.dir={run}", "data.ignore=[label]", "train.max_steps=1")
    assert result.code == 0, result.err
    result = tritune(*tiny, f"data.train={path}", f"run.dir={run}")
    assert result.code == EXIT_INPUT
    assert (run / "summary.json").is_file(), "what was trained there stays"


def test_a_stream_says_what_it_does_not_read(tritune, tiny, chat_file, tmp_path):
    stream = ["data.streaming=true", "data.pack_window=8", "checkpoint.every=1", "train.max_steps=1"]
    result = tritune(*tiny, f"data.train={chat_file}", f"run.dir={tmp_path / 'run'}", *stream)
    assert result.code == 0, result.err
    assert "not read there: column id in 8 rows, column source in 8 rows" in result.err


# -- counting ----------------------------------------------------------------------------------------------


def test_what_is_empty_is_not_counted_and_names_are_bounded():
    unread = Unread()
    unread.add({"a": None, "b": "", "c": [], "d": {}, "e": 0, "f": False}, "abcdef")
    assert unread.rows == {"column e": 1, "column f": 1}
    assert not unread.texts
    for number in range(MOST + 5):
        unread.add({f"k{number}": 1}, [f"k{number}"])
    assert len(unread.rows) == MOST + 1
    assert sum(unread.rows.values()) == MOST + 7
    assert unread.rows["column others"] == 7


class Template:
    """Writes the names of users and nothing else; counts how often it is asked."""

    asked = 0

    def prompt(self, messages, place, tools=None):
        self.asked += 1
        return "".join(m.get("name", "") for m in messages if m["role"] == "user")


def test_a_key_is_tried_a_few_times_and_by_role():
    template, unread = Template(), Unread()
    reader = KeyReader(template)
    messages = [
        {"role": "user", "content": "q", "name": "n", UNTRAINED: True},
        {"role": "assistant", "content": "a", "name": "n"},
    ]
    reader.count([Record(f"f:{i}", messages=messages) for i in range(100)], unread)
    assert unread.rows == {"message key name": 100}
    assert template.asked < 20


def test_columns_of_each_kind_are_counted():
    reading = Reading(Config().data, learning("pretrain"))
    for number in range(3):
        reading.record(Row({"text": "t", "url": "u", "meta": {"a": 1} if number else {}}, "f:1"))
    assert reading.unread.rows == {"column url": 3, "column meta": 2}
