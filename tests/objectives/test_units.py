"""Units of several documents stay whole, from the rows to the batch."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Duplicates
from tritune.trainer.config.compose import load_config
from tritune.trainer.data.examples import Columns, Examples
from tritune.trainer.data.feed import make_loader
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.loader import Dealer, TrainLoader, collate, evaluation_batches
from tritune.trainer.data.order import Order
from tritune.trainer.data.pipeline import Piece, encode_records
from tritune.trainer.data.splits import Splits, encoder_of, source_of
from tritune.trainer.data.tables import Divider
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.run.state import TrainState

CPU = torch.device("cpu")
PLUGINS = Path(__file__).parents[1] / "plugins"


@pytest.fixture
def contrast(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGINS))
    yield importlib.import_module("contrast").ContrastConfig()
    sys.modules.pop("contrast")


def examples(lengths: list[int], unit: int) -> Examples:
    columns = Columns()
    for i, n in enumerate(lengths):
        columns.add(np.arange(n), [(1, n)] if n > 1 else [], f"f:{i // unit}")
    return Examples([pa.Table.from_batches([columns.batch()])], unit=unit)


def whole(rows: np.ndarray, unit: int) -> bool:
    """Whether rows are units, each from its first document to its last."""
    units = np.asarray(rows).reshape(-1, unit)
    return bool((units == units[:, :1] + np.arange(unit)).all() and (units[:, 0] % unit == 0).all())


def encoded(config: Config, records: list[Record]) -> Piece:
    encoder, _ = encoder_of(config.data, config.objective, byte_tokenizer(), [])
    return encode_records(records, source_of("f", "data.train", config.data, config.objective, encoder).encoder)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 40), st.booleans(), st.integers(0, 5), st.integers(1, 4), st.integers(1, 7))
def test_an_epoch_deals_each_unit_once_and_whole(unit, count, packed, seed, ranks, batch):
    """Over all ranks and steps, each document comes once, and those of a unit stand together in one micro-batch."""
    rng = random.Random(seed)
    data = examples([rng.randint(2, 30) for _ in range(unit * count)], unit)
    order = Order(data, seed, capacity=30 * unit if packed else None, window=16)
    rows, bounds = order.epoch(0)
    assert whole(rows, unit)
    assert sorted(rows.tolist()) == list(range(unit * count))
    assert all(whole(rows[a:b], unit) for a, b in itertools.pairwise(bounds))
    steps = -(-(len(bounds) - 1) // batch)
    seen, micro = [], rng.choice([None, 1, 2])
    for rank in range(ranks):
        dealer = Dealer(batch, micro, 0, rank, ranks, CPU, packed=packed)
        state = TrainState()
        loader = TrainLoader(Order(data, seed, capacity=order.capacity, window=16), state, dealer, 1, None)
        assert loader.total_steps == steps
        for window in loader:
            for one in window:
                assert one.unit == unit
                assert len(one.sample_ids) % unit == 0
                if (one.sample_ids >= 0).all():
                    assert whole(one.sample_ids.numpy(), unit)
                    assert packed or one.packs is None
                    seen += one.sample_ids.tolist()
                else:
                    assert (one.sample_ids == -1).all()
                    assert one.predict.numel() == 0
            loader.advance()
    assert sorted(seen) == list(range(unit * count))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_split_is_scored_by_units(ranks):
    data = examples([5, 9, 2, 2, 30, 3, 4, 8], 2)
    batches = [b for rank in range(ranks) for b in evaluation_batches(data, 2, 0, rank, ranks, CPU)]
    real = [b for b in batches if (b.sample_ids >= 0).all()]
    assert sorted(i for b in real for i in b.sample_ids.tolist()) == list(range(8))
    assert all(whole(b.sample_ids.numpy(), 2) for b in real)


@pytest.mark.parametrize("packed", [True, False])
def test_sums_by_document_are_those_of_a_loop(packed):
    data = examples([5, 1, 2, 7, 30, 3], 2)
    groups = [np.array([0, 1, 2, 3]), np.array([4, 5])] if packed else range(6)
    batch = collate(data, groups, 0)
    values = torch.arange(batch.predict.numel(), dtype=torch.float64).requires_grad_()
    expected, at = [], 0
    for length in batch.lengths.tolist():
        expected.append(values[at : at + length - 1].sum())
        at += length - 1
    found = batch.sum_by_document(values)
    assert found.tolist() == [float(x.detach()) for x in expected]
    (found * torch.arange(1.0, 7.0)).sum().backward()
    assert values.grad.tolist() == [d + 1.0 for d, n in enumerate(batch.lengths.tolist()) for _ in range(n - 1)]


def test_a_row_of_which_one_document_is_left_out_goes_whole(contrast):
    """One that says no pair, one of which a document is too long, one without an answer: each counted once, none in part."""
    config = Config(objective=contrast)
    config.data.max_length, config.data.overlong = 40, type(config.data.overlong)("drop")
    tokenizer = byte_tokenizer()
    rows = [("q", "one two"), ("q", "same"), ("q", "x " * 40 + "y"), ("q", "three four five"), ("q", "")]
    piece = encoded(config, [Record(f"f (2).jsonl:{i}", prompt=p, response=r) for i, (p, r) in enumerate(rows, 1)])
    assert [place[-1] for place in piece.batch["place"].to_pylist()] == ["1", "1", "4", "4"]
    said = [tokenizer.decode(ids).rpartition("assistant\n")[2] for ids in piece.batch["ids"].to_pylist()]
    assert said[:2] == ["one two<|im_end|>\n", "two one<|im_end|>\n"]
    assert (len(piece.points), piece.points[0] == piece.points[1]) == (4, True)
    assert ([e.value[-1] for e in piece.bad], [p[-1] for p in piece.too_long]) == (["2", "5"], ["3"])
    config.data.max_length, config.data.overlong = 36, type(config.data.overlong)("cut")
    (record,) = [Record("f (2).jsonl:1", prompt="q " * 30, response="one two")]
    assert encoded(config, [record]).dropped == ["f (2).jsonl:1 (its answer lies beyond the cut)"]


def test_rows_that_share_one_document_are_no_repetition(contrast):
    """Several worse answers to one better answer are the usual shape of preferences."""
    config = Config(objective=contrast)
    config.data.duplicates = Duplicates.drop
    records = [Record(f"f:{i}", prompt="q", response=r) for i, r in enumerate(["a b", "a b", "c d"])]
    contrast.documents_of = lambda record: [replace(record, response="good"), record]
    kept: list[str] = []
    divider = Divider({}, config.data, None, lambda _, batch: kept.extend(batch["place"].to_pylist()), lambda *_: None)
    divider.take(encoded(config, records))
    assert kept == ["f:0", "f:0", "f:2", "f:2"]


def test_a_unit_has_as_many_documents_as_the_objective_says(contrast):
    contrast.documents_of = lambda record: [record] * (1 if record.place == "f:1" else 2)
    config = Config(objective=contrast)
    piece = encoded(config, [Record(f"f:{i}", prompt="q", response="a b") for i in range(2)])
    (fault,) = piece.bad
    assert str(fault).startswith("f:1: the objective makes 1 documents of it, and a unit has 2")


def test_each_pair_comes_once_an_epoch_of_several_sources():
    tables = [examples([3] * 10, 2).table for _ in range(2)]
    data = Examples(tables, unit=2)
    config = load_config(["model=tiny", "data.sources.a.path=a.jsonl", "data.sources.b.path=b.jsonl", "train.epochs=1"])
    dealer = Dealer(4, None, 0, 0, 1, CPU, packed=False)
    loader = make_loader(config, Splits({"train": data}), byte_tokenizer(), [], TrainState(), dealer, print)
    assert sorted(loader.order.rows(0).tolist()) == list(range(20))
