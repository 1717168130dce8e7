"""Files as they come from the world: refused with one clear message, or trained on without what is broken, and that counted."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

GOOD = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(12)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def bad_bytes(folder):
    (folder / "rows.jsonl").write_bytes(lines(GOOD[:6]) + b'{"prompt": "caf\xe9", "response": "b"}\n' + lines(GOOD[6:]))
    return "rows.jsonl", "rows.jsonl:7", "not UTF-8", 12


def truncated_gzip(folder):
    whole = gzip.compress(lines(GOOD) + lines([{"prompt": str(i) * 9, "response": "x"} for i in range(9000)]))
    shards = folder / "shards"
    shards.mkdir()
    (shards / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (shards / "b.jsonl.gz").write_bytes(gzip.compress(lines(GOOD)))
    return "shards", "a.jsonl.gz", "ends", None


def a_long_line(folder):
    with (folder / "rows.jsonl").open("wb") as file:
        file.write(lines(GOOD[:3]) + b'{"prompt": "' + b"x" * 50_000_000 + b'", "response": "y"}\n' + lines(GOOD[3:]))
    return "rows.jsonl", "rows.jsonl:4", "bytes", 12


def a_quoted_newline(folder):
    (folder / "rows.csv").write_text('prompt,response\n"two\nlines",fine\n' + "a,b\n" * 5 + "one cell\n" + "c,d\n" * 6)
    return "rows.csv", "rows.csv:9", "1 cells", 12


def nul_bytes(folder):
    damaged = [*GOOD[:2], {"prompt": "nul \0 here", "response": "x"}, *GOOD[2:]]
    (folder / "rows.jsonl").write_bytes(lines(damaged) + b'{"prompt": "raw \0", "response": "x"}\n')
    return "rows.jsonl", "rows.jsonl:3", "NUL", 12


def mixed_schemas(folder):
    (folder / "rows.jsonl").write_bytes(
        lines([*GOOD, {"text": "another kind of row"}, {"prompt": 3.5, "response": "x"}])
    )
    return "rows.jsonl", "rows.jsonl:13", "column prompt is missing", 12


def an_empty_shard(folder):
    shards = folder / "shards"
    shards.mkdir()
    (shards / "a.jsonl").write_bytes(lines(GOOD[:5]))
    (shards / "b.jsonl").write_bytes(b"")
    (shards / "c.jsonl").write_bytes(lines(GOOD[5:]))
    return "shards", "b.jsonl", "holds no row", 12


def a_broken_parquet(folder):
    shards = folder / "shards"
    shards.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(GOOD), shards / "a.parquet")
    (shards / "b.parquet").write_bytes((shards / "a.parquet").read_bytes()[:-30])
    return "shards", "b.parquet", "Parquet", 12


BROKEN = [
    bad_bytes,
    truncated_gzip,
    a_long_line,
    a_quoted_newline,
    nul_bytes,
    mixed_schemas,
    an_empty_shard,
    a_broken_parquet,
]


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_refused_or_counted(tritune, tiny, tmp_path, make):
    name, place, words, good = make(tmp_path)
    run = [*(o for o in tiny if not o.startswith("data.train")), f"data.train={tmp_path / name}", "train.max_steps=1"]
    refused = tritune(*run, f"run.dir={tmp_path}/refused")
    assert refused.code == 2
    (said,) = [line for line in refused.lines() if line.startswith("tritune: ")]
    assert place in said
    assert words in said
    assert "Traceback" not in refused.err
    skipped = tritune(*run, "data.bad_rows=skip", f"run.dir={tmp_path}/skipped")
    assert skipped.code == 0, skipped.err
    report = json.loads((tmp_path / "skipped" / "data.json").read_text())["train"]
    assert report["bad"] >= 1
    assert place in report["bad_places"][0]
    assert good is None or report["rows"] == good
    assert f"{report['bad']} bad rows skipped" in skipped.err
