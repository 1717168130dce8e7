"""From sources through the cache to the splits of a run: what is kept, left out, kept together and refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
from harness import write_prompts
from options import learning
from tritune.trainer.config import Config
from tritune.trainer.config.choices import BadRows, Duplicates, HeldOut, Kind, Overlong, Unsupervised
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.data import records
from tritune.trainer.data.clean import near_groups
from tritune.trainer.data.examples import SCHEMA
from tritune.trainer.data.pipeline import Source
from tritune.trainer.data.splits import Watch, read_splits
from tritune.trainer.data.tables import REJECTS
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.objectives.classify import ClassifyConfig


def config(tmp_path, **data) -> Config:
    made = Config()
    made.cache.dir = str(tmp_path / "cache")
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


def entries(tmp_path) -> set[str]:
    return {p.name for p in (tmp_path / "cache").iterdir() if (p / "manifest.json").is_file()}


def test_what_decides_the_tokens_decides_the_entry(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", byte_tokenizer()
    write_prompts(path, 50, seed=1)
    read_splits(config(tmp_path, train=str(path)), tokenizer, None)
    assert len(entries(tmp_path)) == 1
    read_splits(config(tmp_path, train=str(path), pack_window=7), tokenizer, None)
    assert len(entries(tmp_path)) == 1, "how rows are arranged does not change them"
    for changed in (
        {"max_length": 100},
        {"validation_share": 0.5},
        {"last_turn_only": True},
        {"overlong": Overlong.drop},
        {"overlong": Overlong.cut_prompt_start},
        {"validation_share": 0.5, "held_out": HeldOut.contiguous},
    ):
        before = entries(tmp_path)
        read_splits(config(tmp_path, train=str(path), **changed), tokenizer, None)
        assert len(entries(tmp_path) - before) == 1, changed
    before = entries(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|><|im_end|>")
    read_splits(config(tmp_path, train=str(path)), tokenizer, None)
    assert len(entries(tmp_path) - before) == 1, "another template"
    before = entries(tmp_path)
    path.write_text(path.read_text().replace("cat", "dog"))
    read_splits(config(tmp_path, train=str(path)), tokenizer, None)
    assert len(entries(tmp_path) - before) == 1, "another content"


def test_processes_make_the_same_rows_in_the_same_order(tmp_path):
    """Several megabytes, so that there is work for several; and someone is told of it."""
    path, told = tmp_path / "rows.jsonl", []
    write_prompts(path, 30_000, seed=2)
    made = []
    for procs in (1, 3):
        settings = config(tmp_path / str(procs), train=str(path), validation_share=0.1)
        settings.cache.num_procs = procs
        watch = Watch(lambda *args: told.append(args), lambda: None)
        made.append(read_splits(settings, byte_tokenizer(), None, watch=watch).examples)
    one, three = made
    assert {n: e.digest for n, e in one.items()} == {n: e.digest for n, e in three.items()}
    places = [three["train"].place(i) for i in (0, 100, 5000)]
    assert places == [one["train"].place(i) for i in (0, 100, 5000)]
    assert len(one["train"]) + len(one["validation"]) == 30_000
    assert len(one["validation"]) == pytest.approx(3000, abs=5 * (30_000 * 0.1 * 0.9) ** 0.5)
    assert told[-1][:2] == ("data.train", 30_000)


def test_a_process_that_is_killed_is_no_silence(tmp_path, monkeypatch):
    from tritune.trainer.data.encode import Conversations

    path = tmp_path / "rows.jsonl"
    write_prompts(path, 30_000, seed=2)
    here = os.getpid()
    call = Conversations.__call__

    def dying(self, records):
        if os.getpid() != here and records[-1].place.endswith("30000"):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, records)

    monkeypatch.setattr(Conversations, "__call__", dying)
    settings = config(tmp_path, train=str(path))
    settings.cache.num_procs = 2
    with pytest.raises(Exception, match="ended abruptly, by signal 9"):
        read_splits(settings, byte_tokenizer(), None)
    assert not entries(tmp_path)


def test_groups_stay_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q {i}", "response": f"r {i}", "user": f"u{i % 40}"} for i in range(800)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = config(tmp_path, train=str(path), validation_share=0.2, test_share=0.2, group="user")
    splits = read_splits(settings, byte_tokenizer(), None).examples
    users = {
        name: {rows[int(e.place(i).rpartition(":")[2]) - 1]["user"] for i in range(len(e))}
        for name, e in splits.items()
    }
    assert users["train"] | users["validation"] | users["test"] == {f"u{i}" for i in range(40)}
    assert sum(map(len, users.values())) == 40, "no user in two splits"
    with pytest.raises(InputError, match=r"data\.group=person.*no row"):
        read_splits(config(tmp_path, train=str(path), group="person", bad_rows=BadRows.skip), byte_tokenizer(), None)


def test_what_is_left_out_is_counted_and_written_down(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"prompt": f"q {i}", "response": "r"}) for i in range(20)]
    lines = [*good, "{broken", good[0], json.dumps({"prompt": "q", "response": ""}),
             json.dumps({"prompt": "q", "response": "r" * 900}), json.dumps({"prompt": 1.5, "response": "r"})]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    kept = {"bad_rows": BadRows.skip, "unsupervised": Unsupervised.drop, "duplicates": Duplicates.drop,
            "overlong": Overlong.drop, "max_length": 200}  # fmt: skip
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    train = read_splits(config(tmp_path, train=str(path), **kept), tokenizer, None).examples["train"]
    report = train.report
    assert (len(train), report.bad, report.dropped, report.duplicates, report.too_long) == (20, 2, 1, 1, 1)
    (key,) = entries(tmp_path)
    rejects = [json.loads(line) for line in (tmp_path / "cache" / key / REJECTS).read_text().splitlines()]
    assert {(r["place"].rpartition(":")[2], r["fate"]) for r in rejects} == {
        ("21", "bad"), ("22", "duplicate"), ("23", "unsupervised"), ("24", "too long"), ("25", "bad"),
    }  # fmt: skip
    for name, words in (
        ("bad_rows", "rows.jsonl:21"),
        ("unsupervised", "rows.jsonl:23"),
    ):
        refusing = {**kept, name: type(kept[name]).refuse}
        with pytest.raises(InputError, match=words):
            read_splits(config(tmp_path, train=str(path), **refusing), tokenizer, None)
    refusing = {**kept, "overlong": Overlong.refuse}  # a row that is too long is a bad one then
    report = read_splits(config(tmp_path, train=str(path), **refusing), tokenizer, None).examples["train"].report
    assert (report.bad, report.too_long) == (3, 0)


def test_the_schema_is_what_is_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_prompts(path, 10, seed=1)
    assert (
        read_splits(config(tmp_path, train=str(path)), byte_tokenizer(), None).examples["train"].table.schema == SCHEMA
    )


def test_near_duplicates_are_left_out_where_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = [f"word{i}" for i in range(40)]
    other = " ".join([*words[:20], "changed", *words[21:]])
    rows = [
        " ".join(words),
        "something else entirely in these words",
        other,
        " ".join(words),
        "and one more row of its own",
    ]
    path.write_text("".join(json.dumps({"prompt": text, "response": "yes"}) + "\n" for text in rows))
    kept = {}
    for how in Duplicates:
        settings = config(tmp_path, train=str(path), duplicates=how, max_length=600)
        train = read_splits(settings, byte_tokenizer(), None).examples["train"]
        kept[how.value] = [int(train.place(i).rpartition(":")[2]) for i in range(len(train))]
        assert train.report.duplicates == 5 - len(train)
    assert kept == {"keep": [1, 2, 3, 4, 5], "drop": [1, 2, 3, 5], "drop_near": [1, 2, 5]}


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", '{"text": "a", "label": "", "who": "x"}\n'),
                                            ("rows.csv", "text,label,who\na,b,x\na,,x\n"),
                                            ("group.csv", "text,label,who\na,b,x\na,c,\n")])  # fmt: skip
def test_an_empty_label_or_group_is_none(tmp_path, name, text):
    """A spreadsheet's empty cell: it would be a class of its own, or one group of rows that have nothing in common."""
    path = tmp_path / name
    path.write_text(text)
    settings = config(tmp_path, train=str(path), group="who")
    settings.objective = ClassifyConfig()
    with pytest.raises(InputError, match=rf"{name}:\d: the column (label|who) is empty"):
        read_splits(settings, byte_tokenizer(), None)


def test_rows_that_call_other_things_are_no_duplicates(tmp_path):
    """Their words are the same, and None; what they call is what they say."""

    def row(city):
        call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        return {"messages": [{"role": "user", "content": "the weather, please, as ever, in the usual place"},
                             {"role": "assistant", "content": None, "tool_calls": [call]}]}  # fmt: skip

    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row(city)) + "\n" for city in ("Rome", "Reykjavik", "Rome")))
    settings = config(tmp_path, train=str(source)).data
    opened = Source(str(source), "data.train", settings, learning("sft"), None)
    opened.settle()
    assert sorted(near_groups(opened, 0.95, lambda: None)) == [f"{source}:1", f"{source}:3"]


def test_a_kept_row_speaks_for_its_group(tmp_path):
    """Of near duplicates the first that can be trained on stays, whatever became of those before it; labels keep rows apart."""
    words = [f"word{i}" for i in range(40)]
    near = [" ".join([*words[:n], "changed", *words[n + 1 :]]) for n in (5, 20, 30)]
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": near[0], "response": ""},
        {"prompt": near[1], "response": ""},
        {"prompt": near[1], "response": "a b c d"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": near[2], "response": "a b c d"}]))
    settings = config(
        tmp_path, train=str(path), duplicates=Duplicates.drop_near, unsupervised=Unsupervised.drop, similarity=0.6
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    settings.data.max_length = 600
    train = read_splits(settings, tokenizer, None).examples["train"]
    assert [train.place(i).rpartition(":")[2] for i in range(len(train))] == ["3"]
    assert (train.report.dropped, train.report.duplicates) == (2, 1)


def test_duplicates_are_dropped_over_all_splits(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "the same", "response": "for all", "user": str(i)} for i in range(30)]
    rows += [{"prompt": f"own {i}", "response": "r", "user": f"u{i}"} for i in range(60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = config(tmp_path, train=str(path), group="user", validation_share=0.4, duplicates=Duplicates.drop)
    splits = read_splits(settings, byte_tokenizer(), None).examples
    assert sum(map(len, splits.values())) == 61


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_of_equal_rows_the_first_stays_whatever_its_split(tmp_path, monkeypatch, size):
    """Training rows stand before held-out ones; where chunks begin says nothing, and each loss is of its own split."""
    monkeypatch.setattr(records, "CHUNK_BYTES", size)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q {i % 8}", "response": "r"} for i in range(10)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "own", "response": "r"}]))
    how = {"duplicates": Duplicates.drop, "held_out": HeldOut.contiguous, "validation_share": 0.25}
    splits = read_splits(config(tmp_path, train=str(path), **how), byte_tokenizer(), None)
    lines = {n: [int(e.place(i).rpartition(":")[2]) for i in range(len(e))] for n, e in splits.examples.items()}
    assert lines == {"train": [1, 2, 3, 4, 5, 6, 7, 8], "validation": [11]}
    assert {n: e.report.duplicates for n, e in splits.examples.items()} == {"train": 0, "validation": 2}
    assert [r["place"] for r in splits.rejects()] == [f"{path}:9", f"{path}:10"]


def test_one_file_as_text_and_as_retention(tmp_path):
    """Blocks of it and its documents are two things, and lie under two keys."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i} of some words" for i in range(50)) + "\n")
    settings = config(tmp_path, train=str(path), retention=str(path), max_length=2048, kind=Kind.text)
    settings.objective = learning("pretrain")
    splits = read_splits(settings, byte_tokenizer(), None).examples
    assert len(splits["retention"]) == 50
    assert len(splits["train"]) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from tritune.trainer.data import splits as module

    path = tmp_path / "rows.jsonl"
    write_prompts(path, 20, seed=1)
    monkeypatch.setattr(module, "content_hash", lambda f, root, beat=None: str(len(f.read_bytes())))
    read = module.pieces

    def growing(*args, **kwargs):
        yield from read(*args, **kwargs)
        write_prompts(path, 21, seed=2)

    monkeypatch.setattr(module, "pieces", growing)
    with pytest.raises(InputError, match="changed while it was read"):
        read_splits(config(tmp_path, train=str(path)), byte_tokenizer(), None)
    assert not entries(tmp_path)


def test_rows_beyond_the_cut_are_counted_over_all_sources(tmp_path):
    """As the audit counts them; and a row that is too long is a bad row where such rows are refused."""
    many, few = tmp_path / "many.jsonl", tmp_path / "few.jsonl"
    good = [{"prompt": f"question {i}", "response": "yes"} for i in range(300)]
    many.write_text("".join(json.dumps(row) + "\n" for row in good))
    few.write_text("".join(json.dumps(row) + "\n" for row in [*good[:10], {"prompt": "q" * 300, "response": "never"}]))
    sources = {"a": SourceConfig(path=str(many)), "b": SourceConfig(path=str(few))}
    read = read_splits(config(tmp_path, sources=sources, max_length=100), byte_tokenizer(), None)
    assert (read.examples["train"].report.dropped, len(read.examples["train"])) == (1, 310)
    with pytest.raises(InputError, match="1 of 11 rows has no token to train on"):
        read_splits(config(tmp_path, train=str(few), max_length=100), byte_tokenizer(), None)
    skipped = config(tmp_path, train=str(few), max_length=100, overlong=Overlong.refuse, bad_rows=BadRows.skip)
    assert read_splits(skipped, byte_tokenizer(), None).examples["train"].report.bad == 1
    skipped.data.bad_rows = BadRows.refuse
    with pytest.raises(InputError, match=r"few.jsonl:11: the row has .* tokens"):
        read_splits(skipped, byte_tokenizer(), None)
