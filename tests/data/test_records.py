"""Rows from files of every kind, each with the place where it stands; and the split by content."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random

import pytest
from options import learning
from tritune.trainer.config.choices import Kind, TextUnit
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data import kinds, templates
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.kinds import Reading, Record, as_records
from tritune.trainer.data.records import hub_version, read_rows, require_source
from tritune.trainer.data.row_limits import DEPTH
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'quote " comma , tab \t end', "label": "b"},
    {"text": "größer 日本語 😀 \u2028 e\u0301", "label": "c"},
    {"text": " spaces ", "label": "a"},
]


def read(path, unit=TextUnit.paragraph):
    return list(read_rows(str(path), "data.train", unit))


def places(rows):
    return [int(r.place.rpartition(":")[2]) for r in rows]


def write(path, text: str, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def jsonl(rows, end="\n") -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + end for r in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_jsonl(tmp_path, end, encoding, suffix):
    rows = read(write(tmp_path / f"f{suffix}", jsonl(ROWS, end), encoding))
    assert [r.fields for r in rows] == ROWS
    assert [r.place for r in rows] == [f"{tmp_path / f'f{suffix}'}:{i}" for i in (1, 2, 3, 4)]


def test_jsonl_line_numbers_count_blank_lines_and_only_line_ends(tmp_path):
    body = '\n{"a": 1}\n\n  \n{"a": "x\u2028y\u0085z\x0b"}\n{"a": 3}'
    rows = read(write(tmp_path / "f.jsonl", body.replace("\x0b", "\\u000b")))
    assert places(rows) == [2, 5, 6]
    assert rows[1].fields["a"] == "x\u2028y\u0085z\x0b"


@pytest.mark.parametrize(
    ("bad", "message"), [("{", "not JSON"), ("[1]", "list"), ("3", "int"), ('{"a": 1} {"b": 2}', "not JSON")]
)
def test_jsonl_faults_name_the_line(tmp_path, bad, message):
    path = write(tmp_path / "f.jsonl", '{"a": 1}\n\n' + bad + "\n")
    with pytest.raises(InputError, match=rf"f\.jsonl:3: .*{message}"):
        read(path)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xe9"}\n')
    with pytest.raises(InputError, match=r"f\.jsonl:2: byte 0xe9"):
        read(tmp_path / "f.jsonl")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_csv(tmp_path, end, encoding, suffix, delimiter):
    path = tmp_path / f"f{suffix}"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(ROWS)
    rows = read(path)
    assert [r.fields for r in rows] == ROWS
    assert places(rows) == [2, 3, 4, 5]


def test_csv_cells_with_line_ends(tmp_path):
    """A row stands where it begins: the line that an editor jumps to."""
    path = write(tmp_path / "f.csv", 'text,label\none,a\n"two\nlines\r\nthree",b\n\nlast,c\n')
    rows = read(path)
    assert [r.fields["text"] for r in rows] == ["one", "two\nlines\r\nthree", "last"]
    assert places(rows) == [2, 3, 7]


def test_csv_faults(tmp_path):
    with pytest.raises(InputError, match=r"f\.csv:3: .*3 cells.*header 2"):
        read(write(tmp_path / "f.csv", "text,label\na,b\na,b,c\n"))
    with pytest.raises(InputError, match=r"f\.csv:1: .*column b stands twice"):
        read(write(tmp_path / "f.csv", "a,b,b\n1,2,3\n"))


def test_csv_with_a_long_document(tmp_path):
    """Python's csv stops at 131,072 characters a cell unless told otherwise; documents are longer."""
    text = "word " * 40_000
    rows = read(write(tmp_path / "f.csv", f"text,label\n{text},a\n"))
    assert rows[0].fields["text"] == text


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    many = [{**ROWS[i % 4], "n": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), tmp_path / "f.parquet", row_group_size=64)
    rows = read(tmp_path / "f.parquet")
    assert [r.fields for r in rows] == many
    assert [int(r.place.rsplit(" ", 1)[1]) for r in rows] == list(range(1, 1001))
    (tmp_path / "g.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"g\.parquet: it does not read as Parquet"):
        read(tmp_path / "g.parquet")


TEXT = "\n\nfirst line\nsecond line\n\n\nthird\n   \nfourth 日本\n\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_by_line(tmp_path, end, encoding):
    rows = read(write(tmp_path / "f.txt", TEXT.replace("\n", end), encoding), TextUnit.line)
    assert [r.fields["text"] for r in rows] == ["first line", "second line", "third", "fourth 日本"]
    assert places(rows) == [3, 4, 7, 9]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_by_paragraph(tmp_path, end):
    text = "\n\nfirst line\nsecond line\n\n\nthird\n\nfourth 日本\nand more"
    rows = read(write(tmp_path / "f.md", text.replace("\n", end)), TextUnit.paragraph)
    assert [r.fields["text"] for r in rows] == ["first line\nsecond line", "third", "fourth 日本\nand more"]
    assert places(rows) == [3, 7, 9]


def test_a_line_of_spaces_separates_paragraphs(tmp_path):
    rows = read(write(tmp_path / "f.txt", "one\n  \ntwo\n\t\n\nthree\n"), TextUnit.paragraph)
    assert [r.fields["text"].strip() for r in rows] == ["one", "two", "three"]


def test_text_by_file(tmp_path):
    rows = read(write(tmp_path / "f.txt", TEXT), TextUnit.file)
    assert [r.fields["text"] for r in rows] == [TEXT]
    assert places(rows) == [1]
    with pytest.raises(InputError, match=r"data\.train=.*g\.txt: the file holds no row"):
        read(write(tmp_path / "g.txt", " \n\n"), TextUnit.file)


def test_shakespeare_by_paragraph(shared):
    """Against a plain split of a real file: every line number leads to the paragraph's first line."""
    path = shared / "text" / "tinyshakespeare.txt"
    lines = path.read_text().split("\n")
    rows = read(path)
    assert len(rows) == sum(1 for p in path.read_text().split("\n\n") if p.strip())
    for row, place in zip(rows, places(rows), strict=True):
        first = row.fields["text"].split("\n")
        assert lines[place - 1 : place - 1 + len(first)] == first


def test_a_datasets_folder(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    rows = read(tmp_path / "one")
    assert [r.fields for r in rows] == ROWS
    assert rows[2].place == f"{tmp_path / 'one'}:row 3"
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}).save_to_disk(
        tmp_path / "two"
    )
    assert [r.fields for r in read_rows(str(tmp_path / "two"), "data.train", TextUnit.line)] == ROWS[:3]
    assert [r.fields for r in read_rows(str(tmp_path / "two"), "data.test", TextUnit.line)] == ROWS[3:]
    with pytest.raises(InputError, match="no split validation"):
        list(read_rows(str(tmp_path / "two"), "data.validation", TextUnit.line))
    (tmp_path / "three").mkdir()
    with pytest.raises(InputError, match="not saved by datasets"):
        read(tmp_path / "three")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


def test_hub_syntax_on_a_local_folder(tmp_path, no_hub):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", jsonl(ROWS))
    write(tmp_path / "folder" / "test.jsonl", jsonl(ROWS[:2]))
    rows = list(read_rows("hf://./folder:train", "data.train", TextUnit.line))
    assert [r.fields for r in rows] == ROWS
    assert rows[1].place == "hf://./folder:train:row 2"
    assert [r.fields for r in read_rows("hf://./folder:test", "data.test", TextUnit.line)] == ROWS[:2]
    with pytest.raises(InputError, match=r"hf://./folder:dev"):
        list(read_rows("hf://./folder:dev", "data.train", TextUnit.line))
    with pytest.raises(InputError, match="needs a name and a split"):
        list(read_rows("hf://./folder", "data.train", TextUnit.line))
    with pytest.raises(InputError, match="did not load"):
        list(read_rows("hf://./nowhere:train", "data.train", TextUnit.line))


def test_hub_rows_that_do_not_read_are_the_users_error(tmp_path, no_hub):
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken" / "train.jsonl", '{"a": 1}\n{nonsense\n')
    with pytest.raises(InputError, match=r"hf://./broken:train"):
        list(read_rows("hf://./broken:train", "data.train", TextUnit.line))


def test_the_version_of_a_hub_dataset_follows_its_rows(tmp_path, no_hub):
    import os

    (tmp_path / "folder").mkdir()
    versions = []
    for seconds, rows in ((10**9, ROWS), (10**9, ROWS), (10**9 + 1, ROWS[:2])):
        os.utime(write(tmp_path / "folder" / "train.jsonl", jsonl(rows)), (seconds, seconds))
        versions.append(hub_version("hf://./folder:train"))
    assert versions[0] == versions[1] != versions[2]
    with pytest.raises(InputError, match="did not load"):
        hub_version("hf://./nowhere:train")


def test_sources_that_are_not_there(tmp_path):
    write(tmp_path / "near.jsonl", "{}")
    with pytest.raises(InputError, match=r"data\.train=.*near\.jsonl"):
        require_source(str(tmp_path / "neer.jsonl"), "data.train")
    with pytest.raises(InputError, match="does not exist either"):
        require_source(str(tmp_path / "nowhere" / "f.jsonl"), "data.train")
    with pytest.raises(InputError, match=r"\.xlsx are not read"):
        require_source(str(write(tmp_path / "f.xlsx", "")), "data.train")


# -- kinds -----------------------------------------------------------------------------------------------


def records(path, objective, **config) -> list[Record]:
    data = DataConfig(**config)
    reading = Reading(data, learning(objective))
    return [reading.record(row) for row in read(path, data.text_unit)]


def test_kinds_are_read_off_the_columns(tmp_path):
    def one(row, objective, **config):
        (record,) = records(write(tmp_path / "f.jsonl", jsonl([row])), objective, **config)
        return record

    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert one({"messages": talk, "prompt": "x", "response": "y"}, "sft").messages == talk
    pair = one({"instruction": "q", "input": "more", "output": "r"}, "sft")
    assert (pair.prompt, pair.response) == ("q\n\nmore", "r")
    assert one({"instruction": "q", "input": "", "output": "r"}, "sft").prompt == "q"
    assert one({"text": "t", "category": 3}, "classify").label == "3"
    assert one({"body": "t", "y": "n"}, "classify", columns={"text": "body", "label": "y"}).text == "t"
    assert one({"text": "t", "label": "a"}, "pretrain").label is None
    forced = one({"messages": talk, "prompt": "x", "response": "y"}, "sft", kind=Kind.prompt_response)
    assert (forced.prompt, forced.messages) == ("x", None)


@pytest.mark.parametrize(
    ("row", "objective", "message"),
    [
        ({"text": "t"}, "sft", "messages or prompt \\+ response"),
        ({"text": "t"}, "classify", "text \\+ label"),
        ({"prompt": None, "response": "r"}, "sft", "must be text"),
        ({"text": "t", "label": 1.5}, "classify", "must be text"),
        ({"text": ["t"], "label": "a"}, "classify", "must be text"),
        ({"messages": []}, "sft", "not a list"),
        ({"messages": "hi"}, "sft", "not a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "sft", "message 0"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "sft", "message 1"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, objective, message):
    with pytest.raises(InputError, match=rf"f\.jsonl:1.*{message}"):
        records(write(tmp_path / "f.jsonl", jsonl([row])), objective)


def test_a_later_row_without_the_column_is_named(tmp_path):
    path = write(tmp_path / "f.jsonl", jsonl([{"prompt": "a", "response": "b"}, {"prompt": "a", "answr": "b"}]))
    with pytest.raises(InputError, match=r"f\.jsonl:2"):
        records(path, "sft")


# -- rows that are too deep or too long --------------------------------------------------------------------


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def talk(**more) -> dict:
    return {"messages": [{"role": "user", "content": "a", **more}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("depth", [DEPTH + 1, 500, 970])
@pytest.mark.parametrize("where", ["message", "tools", "tools as text", "role", "prompt"])
def test_a_row_nested_too_deep_is_a_bad_row_like_others(depth, where):
    row = {
        "message": talk(x=nested(depth - 1)),
        "tools": {**talk(), "tools": nested(depth)},
        "tools as text": {**talk(), "tools": "[" * 100 * depth + "]" * 100 * depth},
        "role": talk(role=nested(depth)),
        "prompt": {"prompt": nested(depth), "response": "b"},
    }[where]
    reading = Reading(
        DataConfig(kind=Kind.prompt_response if where == "prompt" else Kind.messages),
        learning("sft"),
    )
    fault, good = as_records([Row(row, "f:1"), Row({**talk(), "prompt": "a", "response": "b"}, "f:2")], reading)
    assert isinstance(fault, InputError)
    assert fault.value == "f:1"
    wanted = {"role": "without a known role", "prompt": "must be text"}.get(where, f"more than {DEPTH} deep")
    assert wanted in fault.rule
    assert isinstance(good, Record)


def test_the_deepest_row_that_is_read_renders_and_hashes():
    source = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    row = {**talk(x=nested(DEPTH - 1)), "tools": nested(DEPTH)}
    record = Reading(DataConfig(), learning("sft")).record(Row(row, "f:1"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    text = templates.render(tokenizer, record.messages or [], "f:1", tools=record.tools)
    assert text.count("[") == 2 * DEPTH - 1
    assert len(record.digest()) == 32


def test_a_row_that_is_too_long_is_a_bad_row_like_others(monkeypatch):
    monkeypatch.setattr(kinds, "ROW_BYTES", 100)
    rows = [
        ({"text": "a" * 101}, "pretrain"),
        ({"text": "é" * 51}, "pretrain"),
        ({"prompt": "a" * 50, "response": "b" * 51}, "sft"),
        (talk(content="a" * 87), "sft"),  # with the names and roles of two messages
        ({**talk(), "tools": [{"a": ["b" * 99]}]}, "sft"),
    ]
    for row, objective in rows:
        with pytest.raises(InputError, match=r"f:1: the row has 1\d\d bytes of text, and 100 are the most"):
            Reading(DataConfig(), learning(objective)).record(Row(row, "f:1"))
    assert Reading(DataConfig(), learning("pretrain")).record(Row({"text": "a" * 100}, "f:1")).text == "a" * 100


def test_a_message_names_few_columns():
    with pytest.raises(InputError, match=r"k29 and 170 more\."):
        Reading(DataConfig(), learning("sft")).record(Row({f"k{i}": i for i in range(200)}, "f:1"))


# -- the split -------------------------------------------------------------------------------------------


def some(count: int, seed=0) -> list[Record]:
    rng = random.Random(seed)
    return [Record(f"f:{i}", text=f"{rng.random()} {i}", label="ab"[i % 2]) for i in range(count)]


def where(rows, shares) -> dict[str, str]:
    """Place -> split, by the points of the rows: the first share takes the lowest."""
    found = {}
    for row in rows:
        point, edge = row.point(row.digest()), 0.0
        assert 0 <= point < 1
        names = [name for name, share in shares.items() if point < (edge := edge + share)]
        found[row.place] = names[0] if names else "train"
    return found


def test_split_depends_on_content_alone():
    rows, shares = some(500), {"validation": 0.2, "test": 0.1}
    found = where(rows, shares)
    assert where(rows, shares) == found
    mixed = rows[:]
    random.Random(1).shuffle(mixed)
    assert where(mixed, shares) == found
    half = where(rows[:250], shares)
    assert half == {p: found[p] for p in half}, "rows that were added moved none of the old ones"
    moved = [Record("g:" + r.place, text=r.text, label="z") for r in rows]
    assert where(moved, shares) == {"g:" + p: name for p, name in found.items()}, "neither place nor label counts"


def test_duplicates_land_together():
    rows = some(200)
    twice = rows + [Record(f"again:{i}", text=r.text, label="other") for i, r in enumerate(rows)]
    found = where(twice, {"validation": 0.4, "test": 0.3})
    assert all(found[f"f:{i}"] == found[f"again:{i}"] for i in range(200))
    assert set(found.values()) == {"train", "validation", "test"}


def test_a_larger_share_only_adds():
    rows = some(1000)
    small, large = where(rows, {"validation": 0.1}), where(rows, {"validation": 0.3})
    assert all(large[p] == "validation" for p, name in small.items() if name == "validation")


@pytest.mark.parametrize(
    "shares", [{"validation": 0.1}, {"test": 0.5}, {"validation": 0.2, "test": 0.05}, {"validation": 0.001}]
)
def test_shares_are_binomial(shares):
    rows = some(20_000, seed=4)
    found = list(where(rows, shares).values())
    for name, share in shares.items():
        deviation = math.sqrt(share * (1 - share) * len(rows))
        assert abs(found.count(name) - share * len(rows)) < 6 * deviation


def test_fields_do_not_run_into_one_another():
    """ "ab" + "c" is another row than "a" + "bc"."""
    kinds = [
        Record("p", prompt="ab", response="c"), Record("p", prompt="a", response="bc"), Record("p", text="abc"),
        Record("p", messages=[{"role": "user", "content": "abc"}]), Record("p", prompt="c", response="ab"),
    ]  # fmt: skip
    assert len({r.digest() for r in kinds}) == len(kinds)
    assert all(len(r.digest()) == hashlib.sha256().digest_size for r in kinds)
    assert Record("x", text="a", label="1").digest() == Record("y", text="a", label="2").digest()
