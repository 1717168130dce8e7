"""What comes in an epoch: packs, and mixtures of sources."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.data.examples import Columns, Examples
from tritune.trainer.data.order import Order, draws_of, epoch_order, epoch_orders
from tritune.trainer.data.packing import best_fit


def table(lengths) -> pa.Table:
    columns = Columns()
    for i, n in enumerate(lengths):
        columns.add(np.arange(n), [(1, n)] if n > 1 else [], f"f:{i}")
    return pa.Table.from_batches([columns.batch()])


# -- packing ---------------------------------------------------------------------------------------------


def obvious_best_fit(lengths, capacity):
    """The textbook's loop: rows in a list, every one looked at."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in rows if sum(lengths[j] for j in r) + lengths[i] <= capacity]
        if fits:
            max(fits, key=lambda r: sum(lengths[j] for j in r)).append(i)
        else:
            rows.append([i])
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_packs_are_those_of_the_textbook(lengths):
    """As many rows, as full: which of two equally full rows takes a document is not fixed."""
    order, bounds = best_fit(np.array(lengths, np.int64), 40)
    assert sorted(order.tolist()) == list(range(len(lengths))), "each document once"
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    fills = sorted(sum(lengths[i] for i in r) for r in rows)
    assert all(0 < f <= 40 for f in fills)
    assert fills == sorted(sum(lengths[i] for i in r) for r in obvious_best_fit(lengths, 40))


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_an_epoch_of_packs_has_every_row_once(window):
    rng = random.Random(0)
    data = Examples([table([rng.randint(1, 50) for _ in range(300)])])
    order = Order(data, 5, capacity=50, window=window)
    for epoch in range(3):
        rows, bounds = order.epoch(epoch)
        assert sorted(rows.tolist()) == list(range(300))
        sizes = [int(data.lengths[rows[a:b]].sum()) for a, b in itertools.pairwise(bounds)]
        assert max(sizes) <= 50
        assert min(np.diff(bounds)) >= 1
        assert order.num_sequences(epoch) == len(sizes)
    assert order.epoch(0)[0].tolist() != order.epoch(1)[0].tolist()


def test_packs_of_a_window_hold_its_rows_of_the_global_order():
    data = Examples([table([10] * 100)])
    rows, bounds = Order(data, 1, capacity=20, window=25).epoch(3)
    whole = epoch_order(100, 1, 3)
    for start in range(0, 100, 25):
        assert set(rows[start : start + 25].tolist()) == set(whole[start : start + 25].tolist())
    assert np.diff(bounds).max() == 2


def test_long_and_short_packs_are_spread_over_an_epoch():
    """Best fit decreasing makes packs of few long rows first and of many short ones last; a step must not be of one sort."""
    rng = np.random.default_rng(0)
    data = Examples([table(np.concatenate([rng.integers(60, 100, 400), rng.integers(5, 30, 1600)]))])
    _, bounds = Order(data, 0, capacity=100, window=10_000).epoch(0)
    counts = np.diff(bounds)
    halves = counts[: len(counts) // 2].mean(), counts[len(counts) // 2 :].mean()
    error = counts.std() * 2 / np.sqrt(len(counts))  # of the difference of two half means
    assert abs(halves[0] - halves[1]) < 5 * error


# -- mixtures --------------------------------------------------------------------------------------------


def sources(*settings) -> list[SourceConfig]:
    return [SourceConfig("f", **s) for s in settings]


def test_draws():
    assert draws_of([100, 300], sources({}, {}), 1.0).tolist() == [100, 300]
    assert draws_of([100, 300], sources({"weight": 1.0}, {"weight": 1.0}), 1.0).tolist() == [200, 200]
    assert draws_of([100, 300], sources({"epochs": 2.0}, {"epochs": 0.5}), 1.0).tolist() == [200, 150]
    assert draws_of([100, 300], sources({"epochs": 2.0}, {}), 1.0).tolist() == [200, 300]
    hot = draws_of([100, 900], sources({}, {}), 2.0)
    assert hot.tolist() == [250, 750], "square roots, 10 to 30"
    cold = draws_of([100, 1000], sources({}, {}), 0.005)
    assert cold.tolist() == [1, 1100], "almost all of the larger, and nothing overflows"
    assert draws_of([1, 10**6], sources({"weight": 1e-9}, {"weight": 1.0}), 1.0)[0] == 1, "a source is never lost"


def test_each_row_comes_before_any_comes_again():
    data = Examples([table([3] * 7), table([4] * 11)])
    order = Order(data, 2, np.array([5, 14]))
    drawn = np.concatenate([order.rows(e) for e in range(12)])
    for first, count in ((0, 7), (7, 11)):
        mine = [r for r in drawn.tolist() if first <= r < first + count]
        # Within an epoch the sources are shuffled among one another: passes blur by an epoch.
        whole = len(mine) // count
        assert min(mine.count(first + i) for i in range(count)) >= whole - 1
        assert max(mine.count(first + i) for i in range(count)) <= whole + 1
    for epoch in range(12):
        assert np.bincount(data.sources[order.rows(epoch)]).tolist() == [5, 14]


def test_a_row_that_comes_half_a_million_times():
    """Its passes are laid out at once: one after the other took half a minute an epoch."""
    data = Examples([table([3]), table([3] * 5), table([4] * 10)])
    order = Order(data, 2, np.array([500_000, 7, 10]))
    assert np.bincount(order.rows(3), minlength=16).tolist()[0] == 500_000
    for first in (0, 5):
        each = [epoch_order(5, 9, epoch) for epoch in range(first, first + 4)]
        assert epoch_orders(5, 9, first, 4).tolist() == [e.tolist() for e in each]


def test_a_mixture_that_takes_every_row_once_is_the_plain_order():
    data = Examples([table([3] * 7), table([4] * 11)])
    assert Order(data, 2, np.array([7, 11])).rows(4).tolist() == epoch_order(18, 2, 4).tolist()
    assert data.sources.tolist() == [0] * 7 + [1] * 11
