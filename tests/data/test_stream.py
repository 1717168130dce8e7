"""Streams: windows that are functions of where they begin, cursors that are resumed exactly, by any number of ranks."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections import Counter

import harness
import numpy as np
import pytest
import torch
from tritune.trainer.config import Config
from tritune.trainer.config.choices import BadRows, Overlong, Packing
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.data.feed import open_stream
from tritune.trainer.data.loader import Dealer
from tritune.trainer.data.order import uniform
from tritune.trainer.data.stream_loader import StreamLoader
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer, stop_token_ids
from tritune.trainer.run.state import TrainState

CPU = torch.device("cpu")
told: list[str] = []  # what loaders said


def write(path, numbers, opener=open):
    with opener(path, "wt") as file:
        for i in numbers:
            file.write(json.dumps({"prompt": f"row {i}", "response": "x" * (i % 23 + 1)}) + "\n")


@pytest.fixture
def sources(tmp_path):
    """Three shards, one compressed, and another source of 7 rows."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "a.jsonl", range(40))
    write(shards / "b.jsonl.gz", range(40, 75), gzip.open)
    write(shards / "c.jsonl", range(75, 100))
    write(tmp_path / "few.jsonl", range(1000, 1007))
    return {"many": SourceConfig(str(shards), weight=3.0), "few": SourceConfig(str(tmp_path / "few.jsonl"), weight=1.0)}


def config(named, window=16, packing=Packing.best_fit) -> Config:
    made = Config()
    made.data.sources, made.data.pack_window, made.data.packing = named, window, packing
    made.data.max_length, made.data.streaming, made.seed = 200, True, 3
    return made


def loader(named, rank=0, ranks=1, steps=25, state=None, batch=4, **settings) -> StreamLoader:
    made, tokenizer = config(named, **settings), byte_tokenizer()
    stream, digest = open_stream(made.data, made.objective, made.seed, tokenizer, stop_token_ids(tokenizer))
    return StreamLoader(
        stream, state or TrainState(), Dealer(batch, None, 0, rank, ranks, CPU), steps, digest, told.append
    )


def texts(batches) -> list[str]:
    """Every document of some micro-batches, as text."""
    found = []
    for batch in batches:
        flat = batch.input_ids.reshape(-1)
        for start, n, sample in zip(batch.starts, batch.lengths, batch.sample_ids, strict=True):
            if sample >= 0:
                found.append(byte_tokenizer().decode(flat[start : start + n].tolist()))
    return sorted(found)


def run(train):
    steps = []
    for window in train:
        steps.append((texts(window), sum(b.digest for b in window)))
        train.advance()
    train.stream.close()
    return steps


def number(text: str) -> int:
    return int(text.partition("row ")[2].partition("<")[0])


@pytest.mark.parametrize("packing", list(Packing))
def test_any_number_of_ranks_sees_the_same(sources, packing):
    alone = run(loader(sources, packing=packing))
    parts = [run(loader(sources, rank, 3, packing=packing)) for rank in range(3)]
    for step, (rows, digest) in enumerate(alone):
        assert sorted(t for p in parts for t in p[step][0]) == rows
        assert sum(p[step][1] for p in parts) == digest
    assert len(alone) == 25


@pytest.mark.parametrize("stop", [1, 2, 5, 9, 17, 24])
def test_a_cursor_is_resumed_exactly(sources, stop):
    """Also in the middle of a window, after several passes through a source, and when a step reaches over windows."""
    whole = run(loader(sources))
    first = loader(sources, steps=stop)
    assert run(first) == whole[:stop]
    state = TrainState()
    state.load_json(json.loads(json.dumps(first.state.to_json())))
    again = loader(sources, state=state)
    assert run(again) == whole[stop:]
    assert again.state.sources[1][0] >= 5, "the small source was passed through several times"


def test_a_source_is_read_from_front_to_back_over_and_over(sources):
    rows = [number(t) for step in run(loader(sources, steps=150, packing=Packing.none)) for t in step[0]]
    for first, count in ((0, 100), (1000, 7)):
        times = Counter(r for r in rows if first <= r < first + count)
        assert len(times) == count
        assert max(times.values()) - min(times.values()) <= 2, "within a window and a pass"
    share = sum(r >= 1000 for r in rows) / len(rows)
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / len(rows)) ** 0.5


def test_rows_are_shuffled_within_their_window(tmp_path):
    write(tmp_path / "rows.jsonl", range(64))
    train = loader({"one": SourceConfig(str(tmp_path / "rows.jsonl"))}, window=32, packing=Packing.none, steps=16)
    windows = [train.stream.get(0, [(0, 0)])]
    windows.append(train.stream.get(1, windows[0].after))
    for w, window in enumerate(windows):
        rows = [int(window.examples.place(int(s[0])).rpartition(":")[2]) for s in window.sequences]
        assert sorted(rows) == list(range(32 * w + 1, 32 * w + 33))
        assert rows != sorted(rows)
    train.stream.close()


def test_uniform_is_uniform_and_the_same_wherever_it_begins():
    whole = uniform(0, 20_000, 5)
    assert np.array_equal(whole[700:900], uniform(700, 200, 5))
    assert not np.array_equal(whole[:100], uniform(0, 100, 6))
    counts = np.bincount((whole * 10).astype(int), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 60, "chi-square with 9 degrees: a chance of 1e-9"


def test_bad_rows_are_refused_or_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, range(30))
    path.write_text(path.read_text() + "{broken\n")
    train = loader({"one": SourceConfig(str(path))}, steps=30)
    with pytest.raises(InputError, match=r"rows\.jsonl:31"):
        run(train)
    made = config({"one": SourceConfig(str(path))}, packing=Packing.none)
    made.data.bad_rows = BadRows.skip
    stream, digest = open_stream(
        made.data, made.objective, made.seed, byte_tokenizer(), stop_token_ids(byte_tokenizer())
    )
    first = stream.get(0, [(0, 0)])
    second = stream.get(1, first.after)
    assert second.examples.report.bad == 1
    assert second.after == [(1, 1)], "a bad row is a row of its file: cursors count it"
    told.clear()
    train = StreamLoader(stream, TrainState(), Dealer(4, None, 0, 0, 1, CPU), 11, digest, told.append)
    counts = []
    for _ in train:
        train.advance()
        counts.append(train.state.left_out)
    assert counts == [0] * 4 + [1] * 7
    assert ["rows.jsonl:31" in line for line in told] == [True]
    stream.close()


def test_a_stream_that_moved_is_the_same_stream(tmp_path):
    """Its hash, which a resumed run must find again, is of sizes and beginnings, and not of names."""
    places = [tmp_path / name for name in ("rows.jsonl", "moved.jsonl", "other.jsonl")]
    for path, numbers in zip(places, (range(9), range(9), range(1, 10)), strict=True):
        write(path, numbers)
    here, there, other = (loader({"one": SourceConfig(str(path))}).digest for path in places)
    assert here == there != other


def test_no_more_is_read_than_is_trained(tmp_path):
    """A row behind the last step is none of the run's business."""
    write(tmp_path / "rows.jsonl", range(16))
    (tmp_path / "rows.jsonl").open("a").write("{broken\n" * 16)
    train = loader({"one": SourceConfig(str(tmp_path / "rows.jsonl"))}, steps=4, packing=Packing.none)
    assert len(run(train)) == 4


def test_columns_that_no_row_has_are_refused(tmp_path):
    write(tmp_path / "rows.jsonl", range(30))
    made = config({"one": SourceConfig(str(tmp_path / "rows.jsonl"))})
    made.data.columns = {"input": "nowhere"}
    stream, _ = open_stream(made.data, made.objective, made.seed, byte_tokenizer(), stop_token_ids(byte_tokenizer()))
    with pytest.raises(InputError, match="has the column nowhere"):
        stream.get(0, [(0, 0)])


def test_a_source_that_the_first_window_does_not_draw_from(tmp_path):
    """Whether its rows have the columns that the config names shows later."""
    for name, count in (("often", 60), ("rarely", 9)):
        rows = [{"prompt": f"{name} {i}", "response": "x", "more": "and"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    named = {"often": SourceConfig(str(tmp_path / "often.jsonl"), weight=0.97),
             "rarely": SourceConfig(str(tmp_path / "rarely.jsonl"), weight=0.03)}  # fmt: skip
    drawn = set()
    for seed in range(12):
        made = config(named)
        made.data.columns, made.seed = {"input": "more"}, seed
        stream, _ = open_stream(
            made.data, made.objective, made.seed, byte_tokenizer(), stop_token_ids(byte_tokenizer())
        )
        drawn.add(len(np.unique(stream.get(0, [(0, 0), (0, 0)]).examples.sources)))
        stream.close()
    assert drawn == {1, 2}


@pytest.mark.parametrize("window", [1, 3])
def test_windows_of_which_no_row_is_left(tmp_path, window):
    """In a small window one bad row can be all of it: it is counted, and the next one is read."""
    path = tmp_path / "rows.jsonl"
    write(path, range(3))
    path.write_text("{broken\n" * 4 + path.read_text() + "{broken\n")
    made = config({"one": SourceConfig(str(path))}, packing=Packing.none, window=window)
    made.data.bad_rows = BadRows.skip

    def train(state, steps):
        stream, digest = open_stream(
            made.data, made.objective, made.seed, byte_tokenizer(), stop_token_ids(byte_tokenizer())
        )
        return StreamLoader(stream, state, Dealer(2, None, 0, 0, 1, CPU), steps, digest, told.append)

    first = train(TrainState(), 9)
    assert len(first.longest()) == 1
    whole = run(first)
    assert len(whole) == 9
    # 18 rows in 9 steps of 2: five passes before the last row, of which five rows each are bad, and what stands before it
    assert first.state.left_out >= 5 * 5
    half = train(TrainState(), 4)
    assert run(half) == whole[:4]
    assert run(train(half.state, 9)) == whole[4:]


def test_sources_of_which_no_row_can_be_trained_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, range(1))
    path.write_text(path.read_text() + "{broken\n" * 5)
    made = config({"one": SourceConfig(str(path))}, packing=Packing.none, window=2)
    made.data.bad_rows, made.data.max_length = BadRows.skip, 4
    made.data.overlong = Overlong.drop
    stream, digest = open_stream(
        made.data, made.objective, made.seed, byte_tokenizer(), stop_token_ids(byte_tokenizer())
    )
    train = StreamLoader(stream, TrainState(), Dealer(2, None, 0, 0, 1, CPU), 9, digest, told.append)
    with pytest.raises(InputError, match="in a whole pass no row can be trained on"):
        train.longest()
    stream.close()


def test_an_empty_source_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no row"):
        loader({"one": SourceConfig(str(tmp_path / "rows.jsonl"))}).describe()


@pytest.mark.slow
def test_a_streamed_run_goes_on_bit_for_bit(tritune, tmp_path, sources):
    same = [
        "model=tiny", "data.streaming=true", "data.pack_window=16", "data.packing=best_fit", "data.max_length=120",
        f"data.sources.many.path={sources['many'].path}", "data.sources.many.weight=3", "data.sources.few.weight=1",
        f"data.sources.few.path={sources['few'].path}", "train.batch_size=3", "backend.device=cpu", "checkpoint.every=3",
        "export.enabled=false", "report.enabled=false", "train.max_steps=9",
    ]  # fmt: skip
    assert tritune(*same, f"run.dir={tmp_path}/whole").code == 0
    job = harness.start([*same, f"run.dir={tmp_path}/killed"], tmp_path / "logs")
    while len(harness.rows(tmp_path / "killed")) < 5 and job.alive():
        time.sleep(0.02)
    job.signal(9)
    job.wait()
    done = tritune(*same, f"run.dir={tmp_path}/killed")
    assert done.code == 0, done.err
    assert "stream    2 source(s)" in done.err
    whole, killed = (harness.rows(tmp_path / name) for name in ("whole", "killed"))
    keys = ("step", "loss", "grad_norm", "batch", "loss/many", "loss/few")
    for ours, theirs in itertools.zip_longest(whole, killed):
        assert {k: ours.get(k) for k in keys} == {k: theirs.get(k) for k in keys}


def test_what_a_stream_cannot_do_is_refused(tritune, tmp_path, sources):
    path = f"data.train={sources['few'].path}"
    for override, words in (
        ("train.epochs=1", "a stream has no epoch"), ("data.validation_share=0.1", "cannot be cut"),
        ("data.duplicates=drop", "need all rows"), ("", "nothing says when to save"),
    ):  # fmt: skip
        done = tritune(
            "model=tiny", "data.streaming=true", path, "train.max_steps=2", override, f"run.dir={tmp_path}/r"
        )
        assert done.code == 2
        assert words in done.err


def test_a_stream_of_which_many_rows_lie_beyond_the_cut_ends_at_its_first_window(tmp_path):
    with (tmp_path / "long.jsonl").open("w") as file:
        for i in range(64):
            file.write(json.dumps({"prompt": f"row {i}" + "x" * 300 * (i % 4 == 0), "response": "y"}) + "\n")
    with pytest.raises(InputError, match="rows have no token to train on"):
        list(itertools.islice(iter(loader({"long": SourceConfig(str(tmp_path / "long.jsonl"))}, window=64)), 1))
