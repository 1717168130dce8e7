"""The same rows from files of every format: the same tokens and digests, each row at its place; faults name it."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc

import pytest
from options import learning
from tritune.trainer.config import Config
from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.delimited import delimiter_of
from tritune.trainer.data.records import parse_chunk, read_chunks, read_rows
from tritune.trainer.data.splits import read_splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["plain", 'quote " comma , semi ; tab \t end', "größer 日本語 😀", " spaces ", "two\nlines"]
PAIRS = [{"prompt": f"{word} {i}", "response": f"{word} {i} {i}"} for i, word in enumerate(WORDS * 5)]


def chat(number: int) -> dict:
    """A conversation with a call of one of two tools, whose arguments have other names."""
    city, order = {"city": f"town {number}"}, {"order_id": str(number), "carrier": "slow"}
    name, arguments = (("weather", city), ("ship", order))[number % 2]
    call = {"name": name, "arguments": arguments}
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": call}]},
            {"role": "tool", "content": "done", "tool_call_id": "c"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
    }  # fmt: skip


CHATS = [chat(i) for i in range(20)]
LABELLED = [{"text": word, "label": "ab"[i % 2]} for i, word in enumerate(WORDS * 5)]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_jsonl(path, rows):
    path.with_suffix(".jsonl").write_text(lines(rows))
    return path.with_suffix(".jsonl")


def as_utf16(path, rows):
    path.with_suffix(".jsonl").write_text(lines(rows), encoding="utf-16")
    return path.with_suffix(".jsonl")


def as_utf16_without_mark(path, rows):
    path.with_suffix(".jsonl").write_text(lines(rows), encoding="utf-16-be")
    return path.with_suffix(".jsonl")


def as_array(path, rows):
    path.with_suffix(".json").write_text(json.dumps(rows, ensure_ascii=False))
    return path.with_suffix(".json")


def as_printed_array(path, rows):
    path.with_suffix(".json").write_text("\ufeff" + json.dumps(rows, indent=2))
    return path.with_suffix(".json")


def as_printed_objects(path, rows):
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps(row, indent=4) for row in rows))
    return path.with_suffix(".jsonl")


def as_packed_array(path, rows):
    with gzip.open(f"{path}.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
    return f"{path}.json.gz"


def as_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_saved(path, rows):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path)
    return path


def as_csv(path, rows, delimiter=",", encoding="utf-8", ending=".csv", begin=""):
    file = path.with_suffix(ending)
    with file.open("w", newline="", encoding=encoding) as opened:
        opened.write(begin)
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(rows[0])
        writer.writerows(
            [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row.values()] for row in rows
        )
    return file


NESTED = [
    as_jsonl,
    as_utf16,
    as_utf16_without_mark,
    as_array,
    as_printed_array,
    as_printed_objects,
    as_packed_array,
    as_parquet,
    as_saved,
    as_csv,
]
FLAT = {
    "semicolon": lambda p, r: as_csv(p, r, ";", "utf-8-sig"),
    "tab": lambda p, r: as_csv(p, r, "\t"),
    "bar": lambda p, r: as_csv(p, r, "|"),
    "tsv": lambda p, r: as_csv(p, r, "\t", ending=".tsv"),
    "comma in a tsv": lambda p, r: as_csv(p, r, ",", ending=".tsv"),
    "declared": lambda p, r: as_csv(p, r, ";", begin="sep=;\r\n"),
    "utf-16": lambda p, r: as_csv(p, r, "\t", "utf-16"),
    "utf-32": lambda p, r: as_csv(p, r, ",", "utf-32"),
}


def train(tmp_path, path, objective="sft"):
    config = Config()
    config.cache.dir, config.cache.num_procs = str(tmp_path / "cache"), 1
    config.data.train, config.data.require_stop_token = str(path), False
    if objective != "sft":
        config.objective = learning(objective)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return read_splits(config, tokenizer, None).examples["train"]


def contents(examples) -> list[bytes]:
    return examples.table["digest"].to_pylist()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The tokens and contents of each set of rows, from JSONL."""
    found = {}
    for name, rows, objective in (("pairs", PAIRS, "sft"), ("chats", CHATS, "sft"), ("labelled", LABELLED, "classify")):
        folder = tmp_path_factory.mktemp(name)
        examples = train(folder, as_jsonl(folder / "rows", rows), objective)
        assert len(examples) == len(rows)
        found[name] = examples.digest, contents(examples)
    return found


@pytest.mark.parametrize("write", NESTED, ids=lambda w: w.__name__)
def test_every_format_gives_the_same_tokens_and_digests(tmp_path, wanted, write):
    for name, rows, objective in (("pairs", PAIRS, "sft"), ("chats", CHATS, "sft"), ("labelled", LABELLED, "classify")):
        found = train(tmp_path, write(tmp_path / name, rows), objective)
        assert (found.digest, contents(found)) == wanted[name], name


@pytest.mark.parametrize("write", FLAT.values(), ids=FLAT)
def test_every_table_gives_the_same_tokens_and_digests(tmp_path, wanted, write):
    found = train(tmp_path, write(tmp_path / "rows", PAIRS))
    assert (found.digest, contents(found)) == wanted["pairs"]


def test_names_of_classes_are_the_labels(tmp_path, wanted):
    """`datasets` keeps numbers with names; so does the Parquet that it writes."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    named = Dataset.from_list([{**row, "label": "ab".index(row["label"])} for row in LABELLED], features=features)
    named.save_to_disk(tmp_path / "saved")
    named.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        found = train(tmp_path, path, "classify")
        assert (found.digest, contents(found)) == wanted["labelled"]
    unknown = Dataset.from_list([{"text": "t", "label": -1}], features=features)
    unknown.to_parquet(tmp_path / "unknown.parquet")
    assert [r.fields for r in read(tmp_path / "unknown.parquet")] == [{"text": "t", "label": None}]


# -- arrays ------------------------------------------------------------------------------------------------


def read(path):
    return list(read_rows(str(path), "data.train", TextUnit.line))


def test_rows_of_an_array_stand_at_their_lines(tmp_path):
    path = as_printed_array(tmp_path / "rows", [{"a": i, "b": "x\ny"} for i in range(4)])
    assert [int(r.place.rpartition(":")[2]) for r in read(path)] == [2, 6, 10, 14]
    for skip in range(4):
        chunks = read_chunks(str(path), "data.train", TextUnit.line, skip)
        assert [row.fields["a"] for chunk in chunks for row in parse_chunk(chunk)] == list(range(skip, 4))


def test_rows_of_an_array_on_one_line_have_numbers(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": i} for i in range(4)]))
    assert [row.place for row in read(path)] == [f"{path}:{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"f\.json:3: .*not JSON.*line 3"),
        ('[\n{"a": 1},\n{"a": 2}', r"f\.json:3: .*not closed"),
        ('[\n{"a": 1}\n]\n{"a": 2}', r"f\.json:4: something follows"),
        ('[\n{"a": 1},\n3\n]', r"f\.json:3: .*JSON int"),
    ],
)
def test_faults_of_an_array_name_their_line(tmp_path, text, rule):
    (tmp_path / "f.json").write_text(text)
    rows = read_rows(str(tmp_path / "f.json"), "data.train", TextUnit.line)
    assert next(rows).fields == {"a": 1}
    with pytest.raises(InputError, match=rule):
        list(rows)


def test_an_array_is_read_in_constant_memory(tmp_path):
    path = as_array(tmp_path / "rows", [{"a": "word " * 2000, "n": i} for i in range(3000)])
    assert path.stat().st_size > 25 << 20
    tracemalloc.start()
    count = sum(chunk.num_rows for chunk in read_chunks(str(path), "data.train", TextUnit.line))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 8 << 20


def test_conversations_a_line_without_a_name(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "f.jsonl").write_text(json.dumps(talk) + "\n" + json.dumps(talk) + "\n")
    assert [row.fields for row in read(tmp_path / "f.jsonl")] == [{"messages": talk}] * 2


# -- encodings and delimiters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding", "command"),
    [
        ("é", "latin1", "iconv -f latin1"),
        ("\u201cé\u201d", "cp1252", "iconv -f windows-1252"),
        ("日本", "utf-16-le", "iconv -f utf-16"),
    ],
)
def test_the_remedy_for_another_encoding_names_it(tmp_path, text, encoding, command):
    """The command's own words are Python's names for the codecs here: what it converts is read afterwards."""
    path, row = tmp_path / "f.jsonl", json.dumps({"a": text}, ensure_ascii=False)
    if encoding == "utf-16-le":  # begins with letters that need both bytes, so nothing shows what it is
        row = text + row
    path.write_bytes(row.encode(encoding))
    with pytest.raises(InputError, match=command) as caught:
        read(path)
    name = caught.value.remedy.split("iconv -f ")[1].split()[0]
    if encoding != "utf-16-le":
        path.write_text(path.read_bytes().decode(name), encoding="utf-8")
        assert read(path)[0].fields == {"a": text}


def test_a_file_that_ends_within_a_character_of_utf16(tmp_path):
    (tmp_path / "f.jsonl").write_bytes('{"a": "x"}\n'.encode("utf-16")[:-1])
    with pytest.raises(InputError, match="begins as UTF-16-LE, and does not read as such"):
        read(tmp_path / "f.jsonl")


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a,b\n1,2\n", ","),
        ("a;b\n1,5;2,5\n", ";"),
        ("a;b\n1,5;2\n", ";"),
        ("a\tb\n1,2\t3\n", "\t"),
        ("a,b\n1;2,3;4\n", ","),
        ("text\nhello; world\n", ","),
        ("text\nhello\n", ","),
        ('"a;x",b\n1,2\n', ","),
        ('a;b\n"x;\ny";2\n', ";"),
        ("a,b\n1,2,3\n", ","),
        ("", ","),
    ],
)
def test_the_delimiter_is_what_the_rows_agree_on(text, delimiter):
    assert delimiter_of(text) == delimiter


def test_a_row_of_other_cells_is_named_by_its_delimiter(tmp_path):
    (tmp_path / "f.csv").write_text("a;b\n" + "1;2\n" * 60 + "1;2;3\n")
    with pytest.raises(
        InputError, match=r"f\.csv:62: this row has 3 cells, and the header 2\. Quote cells that contain semicolons"
    ):
        read(tmp_path / "f.csv")


def cells_of(tmp_path, name: str, text: str) -> list[dict]:
    (tmp_path / name).write_text(text)
    return [row.fields for row in read(tmp_path / name)]


def test_columns_of_a_spreadsheet_that_have_no_name(tmp_path):
    """Once touched, they are written: in the header and the rows, or in the rows alone."""
    named = cells_of(tmp_path, "a.csv", "text,label,,\nhi,x,,\nho,y,,note\n")
    assert named == [{"text": "hi", "label": "x", "column 3": "", "column 4": ""},
                     {"text": "ho", "label": "y", "column 3": "", "column 4": "note"}]  # fmt: skip
    assert cells_of(tmp_path, "b.csv", "text,label\nhi,x,,\nho,y\n") == [
        {"text": "hi", "label": "x"},
        {"text": "ho", "label": "y"},
    ]
    with pytest.raises(InputError, match="this row has 4 cells, and the header 2"):
        cells_of(tmp_path, "c.csv", "text,label\nhi,x\nho,y,,z\n")
    assert cells_of(tmp_path, "index.csv", ",text\n0,hi\n") == [{"": "0", "text": "hi"}], "pandas' index has no name"


QUOTES = [
    ('he said "no"', 'he said "no"'), ('"no" he said', '"no" he said'), ('"never', '"never'), ('say "', 'say "'), ('"', '"'),
    ('"whole"', "whole"), ('"a ""b"" c"', 'a "b" c'), ('""', ""), ("plain", "plain"),
]  # fmt: skip


def test_tabs_without_quoting(tmp_path):
    """A cell that begins with a quote and one that ends with it are cells; a quoted one loses its quotes."""
    rows = [(written, cell, f"label {i}") for i, (written, cell) in enumerate(QUOTES * 3)]
    text = "text\tlabel\n" + "".join(f"{written}\t{label}\n" for written, _, label in rows)
    assert cells_of(tmp_path, "a.tsv", text) == [{"text": cell, "label": label} for _, cell, label in rows]


def test_tabs_with_quoting_as_pandas_writes_them(tmp_path):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(
        {"text": ["a\tb", "one\ntwo", 'he "said"', "x\n\ny", "plain", '"', "end\n"], "label": list("abcdefg")}
    )
    table.to_csv(tmp_path / "p.tsv", sep="\t", index=False)
    rows = list(read(tmp_path / "p.tsv"))
    assert [row.fields for row in rows] == table.to_dict("records")
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "3", "5", "6", "9", "10", "11"]
