"""The cache: one builds and the others wait, killed builders leave nothing that is used, whatever changes is built anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from harness import write_prompts
from tritune.trainer.config import Config, ObjectiveConfig
from tritune.trainer.config_choices import BadRows, Duplicates, Kind, Overlong, Unsupervised
from tritune.trainer.data import cache
from tritune.trainer.data.cache import build_once, content_hash, read_entry
from tritune.trainer.data.clean import near_groups
from tritune.trainer.data.examples import SCHEMA, Columns
from tritune.trainer.data.pipeline import Source
from tritune.trainer.data.splits import Watch, read_splits
from tritune.trainer.data.tables import REJECTS, Divider, TableFiles
from tritune.trainer.errors import InputError, StopRequested
from tritune.trainer.tokenizer import byte_tokenizer

FORK = multiprocessing.get_context("fork")


def build_slowly(folder: Path, seconds: float, log: Path):
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    columns = Columns()
    columns.add([1, 2, 3], [(1, 3)], "f:1")
    with TableFiles(folder, ["train"]) as files:
        divider = Divider({}, Config().data, None, files.write, files.reject)
        files.write("train", divider.sinks["train"].take(columns.batch(), []))
        time.sleep(seconds)
        return {"tables": files.finish(divider.sinks)}


def open_entry(root: Path, log: Path, seconds: float) -> None:
    tables, manifest = build_once(root, "key", lambda folder: build_slowly(folder, seconds, log), lambda: None)
    ok = tables["train"]["ids"].to_pylist() == [[1, 2, 3]] and manifest["tables"]["train"]["report"]["rows"] == 1
    os._exit(0 if ok else 1)


def start(*arguments) -> multiprocessing.Process:
    process = FORK.Process(target=open_entry, args=arguments)
    process.start()
    return process


def wait_for(path: Path) -> None:
    for _ in range(500):
        if path.is_file() and path.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def test_one_process_builds_and_the_others_wait(tmp_path):
    log = tmp_path / "log"
    processes = [start(tmp_path / "cache", log, 0.5) for _ in range(5)]
    for process in processes:
        process.join(20)
    assert [p.exitcode for p in processes] == [0] * 5
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_builder_leaves_nothing_that_is_used(tmp_path):
    root, log = tmp_path / "cache", tmp_path / "log"
    victim = start(root, log, 60.0)
    wait_for(log)
    waiting = start(root, log, 0.0)
    time.sleep(0.2)
    assert read_entry(root, "key") is None
    assert waiting.is_alive(), "it waits for the lock"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(20)
    waiting.join(20)
    assert waiting.exitcode == 0, "the kernel gave the lock up with the process"
    assert len(log.read_text().splitlines()) == 2
    assert not list(root.glob("*.part-*")), "its folder is gone too"


@pytest.mark.parametrize("damage", ["table", "manifest", "missing"])
def test_a_damaged_entry_is_built_anew(tmp_path, damage):
    root, log = tmp_path / "cache", tmp_path / "log"

    def entry():
        return build_once(root, "key", lambda folder: build_slowly(folder, 0.0, log), lambda: None)[0]

    entry()
    path = root / "key" / ("manifest.json" if damage == "manifest" else "train.arrow")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    assert read_entry(root, "key") is None
    assert entry()["train"]["ids"].to_pylist() == [[1, 2, 3]]
    assert len(log.read_text().splitlines()) == 2
    entry()
    assert len(log.read_text().splitlines()) == 2


def test_a_refusal_is_told_to_those_that_wait(tmp_path, monkeypatch):
    """Eight ranks must not read a terabyte one after the other to find the same bad row."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    calls = []

    def refuse(folder):
        calls.append(folder)
        raise InputError("f:7", "it is bad", "Mend it")

    for _ in range(3):
        with pytest.raises(InputError, match="f:7: it is bad"):
            build_once(tmp_path, "key", refuse, lambda: None)
    assert len(calls) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError):
        build_once(tmp_path, "key", refuse, lambda: None)
    assert len(calls) == 2, "another start looks again: the file may have been mended"


def test_a_stop_is_told_to_those_that_wait_and_leaves_nothing(tmp_path, monkeypatch):
    """Else each rank in turn would begin to build what the one before it gave up."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    calls = []

    def stopped(folder):
        (folder / "train.arrow").write_bytes(b"half")
        calls.append(folder)
        raise StopRequested("this rank")

    for _ in range(3):
        with pytest.raises(StopRequested):
            build_once(tmp_path, "key", stopped, lambda: None)
    assert len(calls) == 1
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache\.dir=.*cannot be kept there"):
        build_once(tmp_path / "file" / "cache", "key", lambda folder: {}, lambda: None)


def test_hashes_are_remembered_once_a_file_has_settled(tmp_path, monkeypatch):
    path, root = tmp_path / "f", tmp_path / "cache"
    path.write_text("one")
    first = content_hash(path, root)
    assert not (root / "files").exists(), "it could change within the same tick of the clock"
    path.write_text("two")
    second = content_hash(path, root)
    assert first != second
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    assert content_hash(path, root) == second
    (note,) = (root / "files").iterdir()
    assert note.read_text() == second
    note.write_text("0" * 64)
    assert content_hash(path, root) == "0" * 64, "read from the note, not from the file"
    path.write_text("three")
    assert content_hash(path, root) != "0" * 64


# -- through to the splits -------------------------------------------------------------------------------


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
    ):
        before = entries(tmp_path)
        read_splits(config(tmp_path, train=str(path), **changed), tokenizer, None)
        assert len(entries(tmp_path) - before) == 1, changed
    before = entries(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n' -}}", "assistant: ' -}}")
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
        ("overlong", "rows.jsonl:24"),
    ):
        refusing = {**kept, name: type(kept[name]).refuse}
        with pytest.raises(InputError, match=words):
            read_splits(config(tmp_path, train=str(path), **refusing), tokenizer, None)


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
    settings.objective = ObjectiveConfig("classify")
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
    opened = Source(str(source), "data.train", settings, "sft", None)
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


def test_one_file_as_text_and_as_retention(tmp_path):
    """Blocks of it and its documents are two things, and lie under two keys."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i} of some words" for i in range(50)) + "\n")
    settings = config(tmp_path, train=str(path), retention=str(path), max_length=2048, kind=Kind.text)
    settings.objective.name = "pretrain"
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
