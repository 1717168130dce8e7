"""The global order, the ranks' shares of it, and what a batch is made of."""

from __future__ import annotations

import itertools
import random

import harness
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tritune.trainer.config import TrainConfig
from tritune.trainer.config.check import derived_accumulation
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import Dealer, TrainLoader, collate, deal, evaluation_batches
from tritune.trainer.data.order import Order, epoch_order
from tritune.trainer.run.state import TrainState

CPU = torch.device("cpu")


def examples(count: int, seed=0, longest=30) -> Examples:
    rng = np.random.default_rng(seed)
    result = harness.Rows()
    for i in range(count):
        n = int(rng.integers(1, longest))
        result.add(rng.integers(1, 90, n), rng.random(n) < 0.5, f"row {i}", label=int(rng.integers(-1, 4)), num_bytes=i)
    return result.freeze()


def loader(
    data, rank=0, ranks=1, *, batch=7, micro=None, steps=10, seed=3, state=None, capacity=None, unpack=False
) -> TrainLoader:
    dealer = Dealer(batch, micro, 0, rank, ranks, CPU, unpack)
    return TrainLoader(Order(data, seed, capacity=capacity), state or TrainState(), dealer, None, steps)


def run(train: TrainLoader):
    """Drive it as the training loop does."""
    for window in train:
        yield window
        train.advance()


def ids(window) -> list[int]:
    return [s for b in window for s in b.sample_ids.tolist() if s >= 0]


# -- order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 17, 1000])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63, 2**70 + 1])
def test_an_epoch_is_a_permutation(count, seed):
    for epoch in (0, 1, 10**6):
        assert sorted(epoch_order(count, seed, epoch).tolist()) == list(range(count))


def test_orders_differ_between_epochs_and_seeds():
    """Of 1,000 places, two random permutations share one on average (Poisson): 12 would be a chance of 1e-9 each."""
    orders = [epoch_order(1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    orders.append(np.arange(1000))
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 14


def test_the_order_is_fixed_for_ever():
    """SplitMix64 in Python's integers: a resumed run must find its order under any version of any library."""
    mask = 2**64 - 1

    def splitmix(x):
        z = x + 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    assert splitmix(0) == 0xE220A8397B1DCDAF, "the first output of SplitMix64 seeded with 0, as published"
    for seed, epoch in [(0, 0), (42, 3), (2**64 - 1, 7)]:
        stream = splitmix(seed) ^ splitmix(epoch + 0x5851F42D4C957F2D & mask)
        keys = [splitmix(i + splitmix(stream) & mask) for i in range(50)]
        assert epoch_order(50, seed, epoch).tolist() == sorted(range(50), key=keys.__getitem__)


def test_the_order_is_uniform():
    """Where sample 0 lands, over 4,000 (seed, epoch) pairs: chi-square on ten places."""
    places = [int(np.flatnonzero(epoch_order(10, seed, epoch) == 0)[0]) for seed in range(80) for epoch in range(50)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < chi2.isf(1e-9, 9)


# -- deal ------------------------------------------------------------------------------------------------


def test_ranks_share_a_window_exactly():
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 50) for _ in range(200)])
    for _ in range(400):
        rows = np.array(rng.sample(range(200), rng.randint(1, 60)))
        size, ranks = rng.choice([None, rng.randint(1, 70)]), rng.randint(1, 9)
        dealt = [deal(rows, lengths, size, rank, ranks) for rank in range(ranks)]
        taken = [r for part in dealt for _, group in part for r in group.tolist()]
        assert sorted(taken) == sorted(rows.tolist()), "each row once"
        assert len({len(part) for part in dealt}) == 1, "equally many micro-batches on each rank"
        indices = [i for part in dealt for i, _ in part]
        assert sorted(indices) == list(range(len(indices))), "numbered once over all ranks"
        per_rank = -(-len(rows) // ranks)
        assert all(len(g) <= min(size or per_rank, per_rank) for part in dealt for _, g in part)
        if len(rows) > 0 and (size is None or size <= len(rows)):
            train = TrainConfig(batch_size=len(rows), micro_batch_size=size)
            assert len(dealt[0]) == derived_accumulation(train, ranks), "as many as the config says"


def test_micro_batches_hold_rows_of_like_length():
    """Sorted by length, longest first, so that padding is least; and the first micro-batch is the most expensive."""
    lengths = np.array([5, 50, 7, 49, 6, 48])
    (part,) = [deal(np.arange(6), lengths, 3, 0, 1)]
    assert [set(g.tolist()) for _, g in part] == [{1, 3, 5}, {0, 2, 4}]


# -- collate ---------------------------------------------------------------------------------------------


def test_collate_equals_the_obvious():
    data, rng = examples(40), random.Random(1)
    for _ in range(60):
        rows = rng.sample(range(40), rng.randint(1, 9))
        batch = collate(data, rows, 99, step=5, index=2)
        width = max(int(data.lengths[r]) for r in rows)
        expected, predict, targets = [], [], []
        for b, r in enumerate(rows):
            tokens, wanted = data.ids(r).tolist(), harness.mask_of(data, r)
            expected.append(tokens + [99] * (width - len(tokens)))
            for t in range(1, len(tokens)):
                if wanted[t]:
                    predict.append(b * width + t - 1)
                    targets.append(tokens[t])
        assert batch.input_ids.tolist() == expected
        assert batch.predict.tolist() == predict
        assert batch.targets.tolist() == targets
        assert batch.lengths.tolist() == [len(data.ids(r)) for r in rows]
        assert batch.labels.tolist() == data.labels[rows].tolist()
        assert batch.sample_ids.tolist() == rows
        assert batch.num_tokens == sum(batch.lengths.tolist())
        assert batch.num_bytes == sum(rows)
        assert (batch.step, batch.index) == (5, 2)
        assert batch.starts.tolist() == [b * width for b in range(len(rows))]
        assert batch.packs is None
        for name in ("input_ids", "starts", "lengths", "sample_ids", "predict", "targets", "labels", "sources"):
            assert getattr(batch, name).dtype == torch.int64


def test_packs_lie_one_behind_the_other():
    data, rng = examples(40), random.Random(2)
    for _ in range(60):
        numbers = rng.sample(range(40), 12)
        cuts = sorted(rng.sample(range(1, 12), rng.randint(1, 4)))
        packs = [np.array(numbers[a:b]) for a, b in itertools.pairwise([0, *cuts, 12])]
        batch, alone = collate(data, packs, 99), [collate(data, [r], 99) for r in numbers]
        width, flat = batch.input_ids.shape[1], batch.input_ids.reshape(-1)
        assert width == max(int(data.lengths[p].sum()) for p in packs)
        assert batch.sample_ids.tolist() == numbers
        assert batch.digest == sum(one.digest for one in alone), "the same rows, however they lie"
        targets = iter(batch.targets.tolist())
        for d, (r, one) in enumerate(zip(numbers, alone, strict=True)):
            start, n = int(batch.starts[d]), int(batch.lengths[d])
            assert flat[start : start + n].tolist() == data.ids(r).tolist()
            mine = batch.predict[(batch.predict >= start) & (batch.predict < start + n)]
            assert (mine - start).tolist() == one.predict.tolist()
            assert [next(targets) for _ in one.targets] == one.targets.tolist()
            assert batch.packs.positions.reshape(-1)[start : start + n].tolist() == list(range(n))
            assert set(batch.packs.documents.reshape(-1)[start : start + n].tolist()) == {d}
        bounds = batch.packs.bounds.tolist()
        assert {*batch.starts.tolist(), *(batch.starts + batch.lengths).tolist()} <= set(bounds)
        assert {b * width for b in range(len(packs) + 1)} <= set(bounds), "no document reaches over two rows"
        assert batch.packs.longest == max(np.diff(bounds))
        assert (batch.packs.positions.reshape(-1)[[b for b in bounds if b < len(flat)]] == 0).all()


def test_the_filler():
    batch = collate(examples(3), [], 99)
    assert batch.input_ids.tolist() == [[99]]
    assert (batch.predict.numel(), batch.targets.numel(), batch.num_tokens, batch.num_bytes) == (0, 0, 0, 0)
    assert batch.labels.tolist() == batch.sample_ids.tolist() == [-1]
    assert batch.lengths.tolist() == [1]


# -- the loader ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (1, 2), (2, None), (2, 3), (3, 1), (4, 2), (8, None)])
def test_windows_are_the_same_over_any_number_of_ranks(ranks, micro):
    data = examples(23)
    alone = [sorted(ids(w)) for w in run(loader(data))]
    parts = [list(run(loader(data, rank, ranks, micro=micro))) for rank in range(ranks)]
    assert all(len(p) == 10 for p in parts)
    for step, expected in enumerate(alone):
        windows = [p[step] for p in parts]
        assert sorted(s for w in windows for s in ids(w)) == expected
        assert len({len(w) for w in windows}) == 1
        assert all(b.step == step + 1 for w in windows for b in w)
        assert sorted(b.index for w in windows for b in w) == list(range(sum(map(len, windows))))


def test_epochs_cover_every_sample_once_in_the_global_order():
    data = examples(23)
    train = loader(data, steps=12)
    assert train.steps_in(0) == 4
    windows = [ids(w) for w in run(train)]
    assert [len(w) for w in windows] == [7, 7, 7, 2] * 3
    for epoch in range(3):
        order = epoch_order(23, 3, epoch).tolist()
        for i, window in enumerate(windows[4 * epoch : 4 * epoch + 4]):
            assert sorted(window) == sorted(order[7 * i : 7 * i + 7])
    assert train.state.epoch == 3
    assert train.state.window == 0


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_a_loader_goes_on_where_the_state_stands(stop):
    data = examples(23)
    whole = [ids(w) for w in run(loader(data, steps=12))]
    first = loader(data, steps=stop)
    before = [ids(w) for w in run(first)]
    state = TrainState()
    state.load_json(first.state.to_json())
    assert before + [ids(w) for w in run(loader(data, steps=12, state=state))] == whole


@pytest.mark.parametrize(("ranks", "micro", "batch"), [(1, None, 7), (2, 3, 8), (4, None, 6), (1, 100, 100)])
def test_the_dry_run_is_the_most_expensive_micro_batch(ranks, micro, batch):
    data = examples(23)
    train = loader(data, ranks=ranks, micro=micro, batch=batch)
    (dry,) = train.longest()
    for rank in range(ranks):
        for window in run(loader(data, rank, ranks, micro=micro, batch=batch, steps=20)):
            assert all(b.input_ids.numel() <= dry.input_ids.numel() for b in window)
            assert all(b.input_ids.shape[1] <= dry.input_ids.shape[1] for b in window)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_evaluation_visits_each_row_once(ranks, batch):
    for count in (1, 2, 23):
        data = examples(count)
        parts = [list(evaluation_batches(data, batch, 0, rank, ranks, CPU)) for rank in range(ranks)]
        assert sorted(s for p in parts for s in ids(p)) == list(range(count))
        assert len({len(p) for p in parts}) == 1
        assert all(len(b.sample_ids) <= batch for p in parts for b in p)
        tokens = sum(b.predict.numel() for p in parts for b in p)
        assert tokens == sum(collate(data, [i], 0).predict.numel() for i in range(count))


@pytest.mark.parametrize(("ranks", "micro", "unpack"), [(1, None, False), (2, 1, False), (3, None, True), (2, 4, True)])
def test_packed_windows_are_the_same_however_they_are_computed(ranks, micro, unpack):
    data = examples(60)
    alone = [sorted(ids(w)) for w in run(loader(data, batch=3, capacity=40))]
    parts = [list(run(loader(data, r, ranks, batch=3, micro=micro, capacity=40, unpack=unpack))) for r in range(ranks)]
    assert len({len(w) for w in alone}) > 1, "packs hold various numbers of rows"
    for step, expected in enumerate(alone):
        windows = [p[step] for p in parts]
        assert sorted(s for w in windows for s in ids(w)) == expected
        assert all((b.packs is None) or not unpack for w in windows for b in w)


def test_an_epoch_ends_where_its_packs_do():
    data = examples(60)
    dealer, order = Dealer(4, None, 0, 0, 1, CPU), Order(data, 3, capacity=40)
    train = TrainLoader(order, TrainState(), dealer, 3, None)
    seen = [s for w in run(train) for s in ids(w)]
    assert np.bincount(seen).tolist() == [3] * 60
    assert train.state.epoch == 3
    assert train.total_steps == sum(train.steps_in(e) for e in range(3))
    assert TrainLoader(order, TrainState(), dealer, 3, 2).total_steps == 2


def test_examples_of_several_sources():
    data = Examples([examples(3).table, examples(5, seed=1).table])
    assert data.sources.tolist() == [0] * 3 + [1] * 5
    batch = collate(data, [1, 4, 7], 0)
    assert batch.sources.tolist() == [0, 1, 1]
    assert data.digest != Examples([examples(5, seed=1).table, examples(3).table]).digest
