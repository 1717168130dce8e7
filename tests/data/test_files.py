"""Which files a source is; their bytes, decompressed and cut at line ends, also of files that are damaged or huge."""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.files import LINE_BYTES, line_blocks, require_source, source_files
from tritune.trainer.data.records import parse_chunk, read_chunks, read_rows
from tritune.trainer.errors import InputError

KEY = "data.train"


def names(source) -> list[str]:
    return [p.name for p in source_files(str(source), KEY)]


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data, 1)
    return zstandard.ZstdCompressor().compress(data) if ending == ".zst" else data


def lines_of(path):
    """Blocks as (number, line) pairs, the way that an editor counts; a long line as its size."""
    for number, data in line_blocks(path):
        if isinstance(data, int):
            yield number, data
        else:
            yield from enumerate(data.removesuffix(b"\n").split(b"\n"), number)


# -- sources ---------------------------------------------------------------------------------------------


def test_a_folder_of_shards(tmp_path):
    folder = tmp_path / "shards"
    (folder / "nested.jsonl").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.zst", "c.json.gz", ".hidden.jsonl", "notes.pdf", "_SUCCESS", "d.parquet.gz"):
        (folder / name).write_bytes(
            compressed(b'{"a": "%s"}\n' % name.encode(), name[name.rindex(".") :] if "." in name else "")
        )
    assert names(folder) == ["a.jsonl.zst", "b.jsonl", "c.json.gz"]
    rows = list(read_rows(str(folder), KEY, TextUnit.line))
    assert [r.fields["a"] for r in rows] == ["a.jsonl.zst", "b.jsonl", "c.json.gz"]
    assert rows[2].place == f"{folder / 'c.json.gz'}:1"
    (folder / "README.md").write_text("what this is")
    with pytest.raises(InputError, match=r"more than one format: .*README\.md.*Name those of one: "):
        names(folder)
    assert names(folder / "*.jsonl*") == ["a.jsonl.zst", "b.jsonl"]


def test_globs(tmp_path):
    for name in ("two/x.csv", "one/y.csv", "one/z.csv", "one/.w.csv", "odd[1].csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n1\n")
    assert names(tmp_path / "*" / "?.csv") == ["y.csv", "z.csv", "x.csv"]
    assert names(tmp_path / "**" / "z.csv") == ["z.csv"]
    assert names(tmp_path / "odd[1].csv") == ["odd[1].csv"], "a name that exists is no pattern"
    with pytest.raises(InputError, match=r"data\.train=.*\*\.jsonl: this pattern holds no file"):
        require_source(str(tmp_path / "*.jsonl"), KEY)


def test_sources_that_are_refused(tmp_path):
    for name, message in (
        ("a.jsonl.bz2", r"ending in \.bz2"),
        ("b.parquet.gz", r"ending in \.gz"),
        ("c", "in nothing"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{message} are not read.*jsonl"):
            names(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        names(tmp_path / "d.csv")
    with pytest.raises(InputError, match="holds no file that is read"):
        names(tmp_path)
    assert source_files("hf://name:train", KEY) == []


def test_files_of_a_saved_dataset(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"a": list(range(10))})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert names(tmp_path / "one") == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    assert source_files(str(tmp_path / "two"), "data.test") == [tmp_path / "two/test/data-00000-of-00001.arrow"]


# -- bytes -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=40),
    last=st.booleans(), mark=st.booleans(), ending=st.sampled_from(["", ".gz", ".zst"]), size=st.integers(1, 50),
    limit=st.integers(0, 30),
)  # fmt: skip
def test_lines_against_split(tmp_path_factory, lines, last, mark, ending, size, limit):
    """However the blocks fall: the same lines with the same numbers, and sizes in place of those over the limit."""
    path = tmp_path_factory.mktemp("lines") / f"f.txt{ending}"
    body = b"\n".join(lines) + (b"\n" if last else b"")
    body = body.removeprefix(b"\xef\xbb\xbf")
    path.write_bytes(compressed((b"\xef\xbb\xbf" if mark else b"") + body, ending))
    limit = max(limit, size)
    found = []
    for number, data in line_blocks(path, limit, size):
        assert isinstance(data, int) or data
        found += [(number, data)] if isinstance(data, int) else enumerate(data.removesuffix(b"\n").split(b"\n"), number)
    whole = body.removesuffix(b"\n").split(b"\n") if body else []
    for (number, line), (expected, text) in zip(found, enumerate(whole, 1), strict=True):
        assert number == expected
        assert line == (text if len(text) <= limit else len(text))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_streams_of_several_members(tmp_path, ending):
    """`cat a.gz b.gz`, pigz, pzstd and the seekable format write such files."""
    path = tmp_path / f"f.jsonl{ending}"
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"12345" if ending == ".zst" else b""
    parts = [b'{"n": 1}\n{"n"', b": 2}\n", b"", b'{"n": 3}']
    path.write_bytes(skipped + b"".join(compressed(p, ending) for p in parts) + skipped)
    assert [r.fields["n"] for r in read_rows(str(path), KEY, TextUnit.line)] == [1, 2, 3]


def before_the_end(data: bytes, ending: str) -> bytes:
    """What a stream that is cut off still says, by the library's incremental decoder."""
    return (zlib.decompressobj(31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()).decompress(
        data
    )


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_stream_that_is_cut_off(tmp_path, ending):
    rng = random.Random(3)
    body = b"".join(b'{"n": %d, "x": "%x"}\n' % (i, rng.getrandbits(rng.randint(1, 4000))) for i in range(4000))
    whole = compressed(body, ending)
    path = tmp_path / f"f.jsonl{ending}"
    for cut in [3, len(whole) - 1, len(whole) - 4, *(rng.randrange(20, len(whole)) for _ in range(12))]:
        path.write_bytes(whole[:cut])
        lines = before_the_end(whole[:cut], ending).count(b"\n")
        *chunks, fault = read_chunks(str(path), KEY, TextUnit.line)
        assert [r.fields["n"] for c in chunks for r in parse_chunk(c)] == list(range(lines)), (
            "every whole row before it"
        )
        assert isinstance(fault, InputError)
        assert fault.value == f"{path}:{lines + 1}"
        assert f"ends early: its {ending} stream is cut off" in fault.rule


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_stream_that_is_broken(tmp_path, ending):
    path = tmp_path / f"f.csv{ending}"
    data = bytearray(compressed(b"a,b\n" + random.Random(1).randbytes(40_000).hex(",", 20).encode() + b"\n", ending))
    if ending == ".gz":
        data[-6] ^= 0xFF  # of the checksum
    else:
        data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"f\.csv\{ending}:\d+: it does not read as \{ending}: "):
        list(lines_of(path))
    path.write_bytes(b"plain text, whatever its name says")
    with pytest.raises(InputError, match=rf"f\.csv\{ending}:1: it does not read as \{ending}"):
        list(read_rows(str(path), KEY, TextUnit.line))


# -- size ------------------------------------------------------------------------------------------------


def peak_of(rows) -> tuple[int, int]:
    """Items, and the most bytes that Python held at once while they came."""
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long(tmp_path, ending):
    """50 MB of one letter, a few kilobytes compressed: named, never held, and the rows around it are read."""
    path = tmp_path / f"f.jsonl{ending}"
    size = 50_000_000
    path.write_bytes(compressed(b'{"a": 1}\n{"a": "' + b"x" * (size - 9) + b'"}\n\n{"a": 3}\n', ending))
    assert size > LINE_BYTES
    rows = [row for c in read_chunks(str(path), KEY, TextUnit.line) for row in parse_chunk(c)]
    assert [r.fields["a"] for r in (rows[0], rows[2])] == [1, 3]
    assert (rows[2].place, len(rows)) == (f"{path}:4", 3)
    assert isinstance(rows[1], InputError)
    assert (rows[1].value, rows[1].rule[:32]) == (f"{path}:2", f"this line has {size:,} bytes, "[:32])
    assert f"{LINE_BYTES:,} is the most" in rows[1].rule
    _, peak = peak_of(read_chunks(str(path), KEY, TextUnit.line))
    assert peak < LINE_BYTES + (64 << 20)
    (tmp_path / "g.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * (LINE_BYTES + 1) + b"\n4,5\n")
    chunk, fault = read_chunks(str(tmp_path / "g.csv"), KEY, TextUnit.line)
    assert [r.fields for r in parse_chunk(chunk)] == [{"a": "1", "b": "2"}]
    assert fault.value == f"{tmp_path / 'g.csv'}:3"


def large(path, megabytes: int, end: str = "\n") -> int:
    """Write rows of 400 bytes, a member or frame for a megabyte of them. Returns how many rows."""
    rng = random.Random(5)
    row = '{"text": "%x"}' if ".jsonl" in path.name else "%x"
    rows = [row % rng.getrandbits(1540) + end for _ in range(2500)]
    block = compressed("".join(rows).encode(), path.suffix)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(block)
    return megabytes * len(rows)


@pytest.mark.parametrize(("ending", "megabytes"), [(".gz", 200), (".zst", 60)])
def test_memory_does_not_grow_with_the_file(tmp_path, ending, megabytes):
    path = tmp_path / f"f.jsonl{ending}"
    rows = large(path, megabytes)
    tracemalloc.start()
    count = 0
    for number, chunk in enumerate(read_chunks(str(path), KEY, TextUnit.line)):
        count += chunk.num_rows
        if number % 50 == 0:  # parsing is slow under tracemalloc
            assert sum(1 for _ in parse_chunk(chunk)) == chunk.num_rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < 40e6


@pytest.mark.parametrize(("name", "unit"), [("f.csv.gz", "line"), ("f.txt", "line"), ("g.txt.zst", "paragraph")])
def test_memory_of_other_formats(tmp_path, name, unit):
    """Twice as large takes no more memory."""
    peaks = []
    for megabytes in (6, 12):
        rows = large(tmp_path / name, megabytes, "\n\n")
        found = 0
        tracemalloc.start()
        for chunk in read_chunks(str(tmp_path / name), KEY, TextUnit(unit)):
            found += chunk.num_rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found == rows - (".csv" in name), "the first is a header"
    assert peaks[1] < peaks[0] + 2e6
    assert peaks[1] < 20e6


def test_a_paragraph_without_end(tmp_path):
    """Text whose documents are lines, read as paragraphs: refused before it fills the memory."""
    large(tmp_path / "f.txt", 36)
    (fault,) = read_chunks(str(tmp_path / "f.txt"), KEY, TextUnit.paragraph)
    assert (fault.value, "text_unit=line" in fault.remedy) == (f"{tmp_path / 'f.txt'}:1", True)
