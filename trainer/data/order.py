"""The order of samples, a function of (seed, epoch): which rows an epoch has of each source, in which order, packed or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.packing import best_fit


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch, int64 [num_samples].

    Samples are sorted by a hash (SplitMix64, Steele et al. 2014) and not by a library's generator: a new version of
    NumPy or PyTorch cannot reorder a run that is resumed under it.
    """
    return epoch_orders(num_samples, seed, epoch, 1)[0]


def epoch_orders(num_samples: int, seed: int, first: int, count: int) -> np.ndarray:
    """The permutations of `count` epochs from `first` on, int64 [count, num_samples]."""
    with np.errstate(over="ignore"):
        epochs = np.arange(first, first + count, dtype=np.uint64)[:, None]
        stream = _splitmix(np.uint64(seed & (2**64 - 1))) ^ _splitmix(epochs + np.uint64(0x5851F42D4C957F2D))
        keys = _splitmix(np.arange(num_samples, dtype=np.uint64) + _splitmix(stream))
    return np.argsort(keys, axis=1, kind="stable")


def uniform(first: int, count: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1) of the samples `first` to `first + count`, float64: each a function of (seed, its number)."""
    with np.errstate(over="ignore"):
        stream = _splitmix(_splitmix(np.uint64(seed & (2**64 - 1))) + np.uint64(0xD1B54A32D192ED03))
        words = _splitmix(np.arange(first, first + count, dtype=np.uint64) + stream)
    return (words >> np.uint64(11)) * 2.0**-53


def _splitmix(x):
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws_of(counts: Sequence[int], sources: Sequence[SourceConfig], temperature: float) -> np.ndarray:
    """How many rows of each source an epoch has, int64 [sources].

    A source with `epochs` gives so many times its rows. The others together give as many rows as they have, each in proportion
    to its weight (its rows, where none is given) to the power 1 / temperature (Arivazhagan et al. 2019, arXiv 1907.05019).
    """
    rows = np.array(counts, np.float64)
    fixed = np.array([s.epochs is not None for s in sources])
    draws = np.array([n * (s.epochs or 0.0) for n, s in zip(rows, sources, strict=True)])
    if not fixed.all():
        weights = [n if s.weight is None else s.weight for n, s in zip(rows, sources, strict=True)]
        shares = np.where(fixed, 0.0, softened(weights, temperature))
        draws = np.where(fixed, draws, rows[~fixed].sum() * shares / shares.sum())
    return np.maximum(np.rint(draws), 1).astype(np.int64)


def softened(weights: Sequence[float], temperature: float) -> np.ndarray:
    """Weights to the power 1 / temperature, the largest 1: none overflows."""
    values = np.array(weights, np.float64)
    return np.power(values / values.max(), 1.0 / temperature)


def packed_window(
    units: np.ndarray, lengths: np.ndarray, capacity: int, seed: int, stamp: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack units and shuffle the packs.

    Args:
        units: int64 [n, unit], numbers of rows in the global order.
        lengths: int64 [rows], tokens by number.
        stamp: what tells this window's shuffling from others of the seed.

    Returns:
        The rows, pack by pack, int64 [n * unit], and how many each pack has, int64 [packs].
    """
    order, bounds = best_fit(lengths[units].sum(axis=1), capacity)
    # Filled in the order of length: taken as they come, a step would have long rows alone or short ones.
    shuffled = epoch_order(len(bounds) - 1, seed, stamp)
    counts = np.diff(bounds)[shuffled]
    starts = np.repeat(bounds[shuffled] - np.cumsum(counts) + counts, counts)
    return units[order[starts + np.arange(len(units))]].reshape(-1), counts * units.shape[1]


def rows_of_units(units: np.ndarray, size: int) -> np.ndarray:
    """The rows of some units by their numbers, int64 [n * size]."""
    return (units[:, None] * size + np.arange(size)).reshape(-1)


class Order:
    """What comes in an epoch: sequences, each a row or rows packed together.

    Args:
        draws: rows of each source in an epoch; None for each row once.
        capacity: tokens of a pack; None for a row a sequence.
        window: rows among which packs are filled.
    """

    def __init__(
        self, examples: Examples, seed: int, draws: np.ndarray | None = None, capacity: int | None = None,
        window: int = 16384,
    ) -> None:  # fmt: skip
        self.examples, self.seed, self.capacity, self.window = examples, seed, capacity, window
        # Everything is counted in units: of one row each, or of several that stay together.
        counts = np.bincount(examples.sources, minlength=0 if draws is None else len(draws)) // examples.unit
        self.counts = counts
        self.draws = counts if draws is None else draws
        self._once = bool((self.draws == self.counts).all())
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None
        self._counted: dict[int, int] = {}

    def num_sequences(self, epoch: int) -> int:
        """How many an epoch has; to know it, packs must be made, once."""
        if self.capacity is None:
            return int(self.draws.sum())
        if epoch not in self._counted:
            self._counted[epoch] = len(self.epoch(epoch)[1]) - 1
        return self._counted[epoch]

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of an epoch, int64 [n], and where among them each sequence begins, int64 [sequences + 1]."""
        planned = self._planned  # one read: the thread that works ahead may be an epoch further
        if planned is None or planned[0] != epoch:
            rows = self.rows(epoch)
            plain = (rows, np.arange(0, len(rows) + 1, self.examples.unit))
            self._planned = planned = (epoch, *(self._pack(rows, epoch) if self.capacity else plain))
        return planned[1], planned[2]

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the global order, int64 [n]; those of a unit follow one another.

        Where a source gives not each row once, its draws run through one permutation after another over the epochs: no row comes
        again before all have come.
        """
        return rows_of_units(self._units(epoch), self.examples.unit)

    def _units(self, epoch: int) -> np.ndarray:
        if self._once:
            return epoch_order(len(self.examples) // self.examples.unit, self.seed, epoch)
        parts, first = [], 0
        for number, (count, draws) in enumerate(zip(self.counts.tolist(), self.draws.tolist(), strict=True)):
            begin, end = epoch * draws, (epoch + 1) * draws
            begun = begin // count
            passes = epoch_orders(count, self.seed + number + 1, begun, (end - 1) // count + 1 - begun)
            parts.append(first + passes.ravel()[begin - begun * count : end - begun * count])
            first += count
        drawn = np.concatenate(parts)
        return drawn[epoch_order(len(drawn), self.seed, epoch)]

    def _pack(self, drawn: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.capacity is not None
        units = drawn.reshape(-1, self.examples.unit)
        windows = np.array_split(units, max(round(len(drawn) / self.window), 1))
        packed, sizes = [], []
        for number, window in enumerate(windows):
            rows, counts = packed_window(
                window, self.examples.lengths, self.capacity, self.seed, epoch + (number + 1 << 32)
            )
            packed.append(rows)
            sizes.append(counts)
        return np.concatenate(packed), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])

    def describe(self, epoch: int = 0) -> str:
        """What packing made of an epoch."""
        rows, bounds = self.epoch(epoch)
        tokens = int(self.examples.lengths[rows].sum())
        fill = tokens / ((len(bounds) - 1) * (self.capacity or 1))
        return f"{len(rows):,} rows in {len(bounds) - 1:,} packs of {self.capacity:,} tokens, {fill:.2%} filled"
