"""Chunks: what crosses between processes, where a stream goes on, and every fault of a file or a row in its place."""

from __future__ import annotations

import csv
import datetime
import io
import json
import pickle
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.files import CHUNK_BYTES, LINE_BYTES
from tritune.trainer.data.records import Row, parse_chunk, read_chunks
from tritune.trainer.errors import InputError

KEY = "data.train"


def items(source, unit=TextUnit.line, skip=0):
    """Rows, bad rows and faults of files in order, each chunk having been pickled; and the count of good and bad rows."""
    found, rows = [], 0
    for chunk in read_chunks(str(source), KEY, unit, skip):
        if isinstance(chunk, InputError):
            found.append(("file", chunk.value, chunk.rule))
            continue
        parsed = list(parse_chunk(pickle.loads(pickle.dumps(chunk))))
        assert len(parsed) == chunk.num_rows > 0
        rows += len(parsed)
        found += [
            ("row", r.place, r.fields) if isinstance(r, Row) else ("bad", r.value, r.rule) for r in parsed
        ]  # fmt: skip
    return found, rows


def short(source, unit=TextUnit.line):
    """Kind and line of each item."""
    return [(kind, int(place.rpartition(":")[2].removeprefix("row "))) for kind, place, _ in items(source, unit)[0]]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


# -- skip ------------------------------------------------------------------------------------------------


def check_skips(source, unit=TextUnit.line, at=None):
    """Going on after n rows gives what stood behind them, faults of files that follow included."""
    every, count = items(source, unit)
    starts = [0]  # index of what follows n rows
    for index, (kind, *_) in enumerate(every):
        if kind != "file":
            starts.append(index + 1)
    for n in at or range(count + 2):
        expected = every[starts[n] :] if n <= count else []
        assert items(source, unit, n)[0] == expected
    return every


LINE = st.one_of(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=8), max_size=3).map(json.dumps),
    st.sampled_from(
        ["", " ", "\t\r", "{", "[1]", '{"a": 1}\r', ' {"a": 1} ', '{"a": 1} x', "null", "\x0c", "\xa0", "\0"]
    ),
)


@settings(max_examples=50, deadline=None)
@given(shards=st.lists(st.lists(LINE, max_size=12), min_size=1, max_size=3), bad=st.booleans())
def test_jsonl_goes_on_anywhere(tmp_path_factory, shards, bad):
    """Against a plain loop over the lines; shards with bad lines, blank ones or nothing at all."""
    folder = tmp_path_factory.mktemp("f")
    expected = []
    for number, lines in enumerate(shards):
        data = "\n".join(lines).encode() + (b"\n\xe9\n" if bad else b"")
        path = write(folder / f"{number}.jsonl", data)
        kinds = []
        for place, line in enumerate(data.split(b"\n"), 1):
            if line.strip(b" \t\r"):
                try:
                    fields = json.loads(line.decode())
                    kinds.append(("row" if isinstance(fields, dict) else "bad", f"{path}:{place}", fields))
                except ValueError:
                    kinds.append(("bad", f"{path}:{place}", None))
        expected += kinds or [("file", str(path), None)]
    found = check_skips(folder)
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    assert [f[2] for f in found if f[0] == "row"] == [e[2] for e in expected if e[0] == "row"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.text(st.sampled_from('a,"\n\r é'), max_size=5), min_size=2, max_size=3), min_size=1, max_size=8
    )
)
def test_csv_goes_on_anywhere(tmp_path_factory, rows):
    """Against csv.DictReader on what csv.writer wrote: quotes, commas and line ends within cells."""
    path = tmp_path_factory.mktemp("f") / "f.csv"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["x", "y"], *rows])
    write(path, text.getvalue().encode())
    found = check_skips(path)
    whole = [r for r in csv.DictReader(io.StringIO(text.getvalue(), newline="")) if not any(r.pop(None, []))]
    assert [f[2] for f in found if f[0] == "row"] == whole
    assert len(found) == len(rows), "a row of three cells is bad, and the next is read"


@pytest.mark.parametrize("unit", list(TextUnit))
def test_text_goes_on_anywhere(tmp_path, unit):
    write(tmp_path / "a.txt", b"one\ntwo\r\n\n \nthree\0\n\nfour")
    write(tmp_path / "b.txt", b"\n\n")
    write(tmp_path / "c.md", b"five\n\nsix\n")
    check_skips(tmp_path, unit)


def test_large_files_go_on_across_chunks(tmp_path):
    """Several chunks each, lines that run over their edges, blank lines between them."""
    rows = [{"n": n, "text": f"{n} " * (n * 37 % 900)} for n in range(6000)]
    lines = b"".join(json.dumps(r).encode() + b"\n" * (1 + (r["n"] % 7 == 0)) for r in rows)
    path = write(tmp_path / "f.jsonl", lines)
    assert len(lines) > 4 * CHUNK_BYTES
    assert sum(1 for _ in read_chunks(str(path), KEY, TextUnit.line)) >= 4
    every = check_skips(path, at=[0, 1, 2999, 5999, 6000])
    assert [f[2] for f in every] == rows
    text = lines.split(b"\n")
    assert all(json.loads(text[int(f[1].rpartition(":")[2]) - 1]) == f[2] for f in every)
    with (tmp_path / "f.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["n", "text"])
        writer.writeheader()
        writer.writerows(rows)
    assert [f[2] for f in check_skips(tmp_path / "f.csv", at=[0, 1, 3000, 6000])] == [
        {"n": str(r["n"]), "text": r["text"]} for r in rows
    ]


def test_parquet_goes_on_within_and_between_row_groups(tmp_path):
    rows = [{"n": n, "messages": [{"role": "user", "content": "x" * (n % 50)}]} for n in range(300)]
    for name, part in (("a", rows[:250]), ("b", []), ("c", rows[250:])):
        table = pyarrow.Table.from_pylist(part, schema=pyarrow.Table.from_pylist(rows).schema)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=64)
    every = check_skips(tmp_path, at=[0, 1, 63, 64, 65, 200, 249, 250, 251, 300])
    assert [f[2] for f in every if f[0] == "row"] == rows
    assert every[250] == ("file", str(tmp_path / "b.parquet"), "the file holds no row")
    assert every[251][1] == f"{tmp_path / 'c.parquet'}:row 1"


def test_parquet_is_not_held_whole(tmp_path):
    """30 MB in one row group."""
    table = pyarrow.table({"text": [random.Random(n).randbytes(1000).hex() for n in range(15_000)]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    del table
    start = pyarrow.total_allocated_bytes()
    most = [pyarrow.total_allocated_bytes() for _ in read_chunks(str(tmp_path / "f.parquet"), KEY, TextUnit.line)]
    assert len(most) > 20
    assert max(most) - start < 12e6


def test_wide_rows_come_in_small_chunks(tmp_path):
    """A thousand rows of 40 KB are no one chunk, and a slice of a batch does not take the batch along."""
    table = pyarrow.table({"text": [chr(97 + n % 26) * 40_000 for n in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    sizes = [len(pickle.dumps(c)) for c in read_chunks(str(tmp_path / "f.parquet"), KEY, TextUnit.line)]
    assert max(sizes) < 2 * CHUNK_BYTES
    assert 20 < len(sizes) < 200


def test_datasets_go_on_anywhere(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    rows = [{"n": n, "any": {"k": n} if n % 2 else [n, "x"]} for n in range(2100)]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    at = [0, 1, 999, 1000, 2099, 2100, 2101]
    assert [f[2] for f in check_skips("hf://./folder:train", at=at)] == rows, "columns of mixed JSON are decoded"
    assert [f[2] for f in items("hf://./folder:train[:10%]")[0]] == rows[:210]
    datasets.load_dataset("./folder", split="train").save_to_disk(tmp_path / "saved", num_shards=2)
    assert [f[2] for f in check_skips(tmp_path / "saved", at=at)] == rows
    (tmp_path / "saved" / "data-00001-of-00002.arrow").write_bytes(b"no arrow")
    with pytest.raises(InputError, match=r"data\.train=.*saved: the saved dataset does not read"):
        items(tmp_path / "saved")


# -- faults ----------------------------------------------------------------------------------------------


def test_bad_lines_of_jsonl(tmp_path):
    good = b'{"a": "\xc3\xa9"}\n'
    data = good + b'{"a": "\xe9"}\n\n{"a": "x\0"}\n' + good + b'{"a":\n' + b"[" * 100_000 + b"\n" + good
    (tmp_path / "f.jsonl").write_bytes(data)
    kinds = [("row", 1), ("bad", 2), ("bad", 4), ("row", 5), ("bad", 6), ("bad", 7), ("row", 8)]
    assert short(tmp_path / "f.jsonl") == kinds
    rules = [r for kind, _, r in items(tmp_path / "f.jsonl")[0] if kind == "bad"]
    assert "0xe9 is not UTF-8" in rules[0]
    assert "NUL" in rules[1]
    assert "not JSON: " in rules[2]
    assert "recursion" in rules[3]
    assert items(write(tmp_path / "g.jsonl", b'{"a": "\\u0000"}'))[0][0][2] == {"a": "\0"}, (
        "left to who reads the column"
    )


def test_bad_rows_of_csv(tmp_path):
    data = b'a,b\n1,2\n"x\ny",3,4\n5\n6,"p\r\n\r\nq"\n7,8\0\n\n9,10\n'
    found = items(write(tmp_path / "f.csv", data))[0]
    assert short(tmp_path / "f.csv") == [("row", 2), ("bad", 3), ("bad", 5), ("row", 6), ("bad", 9), ("row", 11)]
    assert [f[2] for f in found if f[0] == "row"] == [
        {"a": "1", "b": "2"},
        {"a": "6", "b": "p\r\n\r\nq"},
        {"a": "9", "b": "10"},
    ]
    assert "3 cells, and the header 2" in found[1][2]
    assert "NUL" in found[4][2]


UNCLOSED = b'a,b\n1,2\n"' + (b"x" * 999 + b"\n") * (LINE_BYTES // 1000 + 1)


@pytest.mark.parametrize(
    ("data", "kinds", "message"),
    [
        (b"a,b\n1,2\n3,\xe9\n5,6\n", [("row", 2), ("file", 3)], "0xe9 is not UTF-8"),
        (b'a,b\n1,2\n"x\ny\n\xe9",2\n', [("row", 2), ("file", 5)], "0xe9 is not UTF-8"),
        (b'a,b\n1,2\n"3,4\n5,6\n7,8\n', [("row", 2), ("file", 3)], "at line 5: unexpected end of data"),
        (b'a,b\n1,2\n\n"3"x,4\n5,6\n', [("row", 2), ("file", 4)], "expected after"),
        (UNCLOSED, [("row", 2), ("file", 3)], "field larger than field limit"),
        (b"a,b\0\n1,2\n", [("file", 1)], "NUL"),
        (b"a,a\n1,2\n", [("file", 1)], "column a stands twice"),
    ],
)  # fmt: skip
def test_csv_that_breaks_off(tmp_path, data, kinds, message):
    """The rest of such a file is in doubt; the next file is read."""
    write(tmp_path / "a.csv", data)
    write(tmp_path / "b.csv", b"a,b\n1,2\n")
    found = check_skips(tmp_path)
    assert [f[0] for f in found] == [*[k for k, _ in kinds], "row"]
    assert short(tmp_path)[: len(kinds)] == kinds
    assert message in found[len(kinds) - 1][2]


def test_text_with_faults(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\0\n\nthree\n\xff\nfour\n")
    (tmp_path / "b.txt").write_bytes(b"five")
    found = check_skips(tmp_path)
    assert [f[0] for f in found] == ["row", "bad", "row", "file", "row"]
    assert [f[1].rpartition(":")[2] for f in found] == ["1", "3", "5", "6", "1"]
    assert ("NUL" in found[1][2], "0xff is not UTF-8" in found[3][2]) == (True, True)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n \n\r\n"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "txt"])
def test_files_without_rows(tmp_path, data, ending):
    write(tmp_path / f"b.{ending}", data if ending[1:] != "sv" else data.replace(b" ", b""))
    assert items(tmp_path / f"b.{ending}")[0] == [("file", f"{KEY}={tmp_path}/b.{ending}", "the file holds no row")]
    for name in ("a", "c"):
        write(tmp_path / f"{name}.{ending}", b'{"x": 1}\n{"x": 2}\n')
    found = items(tmp_path)[0]
    assert ("file", f"{tmp_path}/b.{ending}", "the file holds no row") == found[len(found) // 2]
    assert [f[0] for f in found].count("file") == 1


def test_parquet_that_is_broken(tmp_path):
    """Without a footer; with pages overwritten; with text that is not UTF-8, and a time that Python has not."""
    table = pyarrow.table({"n": list(range(4000)), "text": [f"{n:x}" * 50 for n in range(4000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    whole = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "b.parquet", whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 4000] = b"\xff" * 4000
    write(tmp_path / "a.parquet", damaged)
    texts = pyarrow.array([b"ok", b"\xe9", b"fine", b"ok"])
    texts = pyarrow.StringArray.from_buffers(4, *texts.buffers()[1:])
    times = pyarrow.array([0, 0, 2**50, 0], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "time": times}), tmp_path / "c.parquet")
    found = items(tmp_path)[0]
    first = [f[0] for f in found].index("file")
    assert [f[2]["n"] for f in found[:first]] == list(range(first))
    assert 0 < first < 4000
    assert found[first][1:] == (str(tmp_path / "a.parquet"), found[first][2])
    assert f"does not read as Parquet after row {first}" in found[first][2]
    assert (found[first + 1][0], found[first + 1][1]) == ("file", str(tmp_path / "b.parquet"))
    rest = found[first + 2 :]
    assert [(f[0], f[1][-5:]) for f in rest] == [("row", "row 1"), ("bad", "row 2"), ("bad", "row 3"), ("row", "row 4")]
    assert rest[3][2] == {"text": "ok", "time": datetime.datetime(1970, 1, 1)}
    assert "utf-8" in rest[1][2]
