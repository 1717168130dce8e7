"""From the global order each rank's micro-batches.

A window is `train.batch_size` consecutive sequences of the order: one optimizer step. Within a window sequences are sorted by
length, cut into micro-batches and dealt to the ranks in turn; where the count does not divide, empty micro-batches of weight 0
fill up, so that all ranks run equally many collectives. A job resumed with another number of ranks sees exactly the samples it
would have seen.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from tritune.trainer.batch import Batch, Packs
from tritune.trainer.data.ahead import Ahead
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.order import Order, rows_of_units
from tritune.trainer.run.state import TrainState


def deal(
    rows: np.ndarray, lengths: np.ndarray, micro_batch_size: int | None, dp_rank: int, dp_size: int
) -> list[tuple[int, np.ndarray]]:
    """Return this rank's micro-batches of a window as (index in the window, numbers); empty ones fill.

    Args:
        rows: numbers of the window's rows or packs, in the global order.
        lengths: tokens by number.
        micro_batch_size: rows per micro-batch at most; None for as many as fall to a rank.
    """
    per_rank = -(-len(rows) // dp_size)
    size = min(micro_batch_size or per_rank, per_rank)
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    groups = [by_length[i : i + size] for i in range(0, len(rows), size)]
    groups += [rows[:0]] * (-len(groups) % dp_size)
    return [(i, groups[i]) for i in range(dp_rank, len(groups), dp_size)]


def collate(
    examples: Examples,
    rows: Sequence[int] | np.ndarray | Sequence[np.ndarray],
    pad_id: int,
    step: int = 0,
    index: int = 0,
) -> Batch:
    """Build a `Batch` from sample numbers, or from packs of them; without any, a unit of one padding token each, of weight 0."""
    packs = [np.atleast_1d(r) for r in rows]
    widths = [int(examples.lengths[p].sum()) for p in packs] or [1] * examples.unit
    width = max(widths)
    input_ids = np.full((len(widths), width), pad_id, dtype=np.int64)
    starts, predict, targets, digest = [], [], [], 0
    for b, pack in enumerate(packs):
        at = 0
        for r in pack:
            ids, wanted = examples.ids(r), examples.trained(r)
            input_ids[b, at : at + len(ids)] = ids
            starts.append(b * width + at)
            predict.append(b * width + at + wanted - 1)  # position t predicts token t + 1
            targets.append(ids[wanted])
            digest += zlib.crc32(
                input_ids[b, at : at + len(ids)].tobytes() + (wanted - 1).tobytes(), int(examples.numbers[r])
            )
            at += len(ids)
    samples = np.concatenate(packs).astype(np.int64) if packs else np.full(examples.unit, -1)
    filler, empty = not packs, np.zeros(0, np.int64)
    lengths = np.ones(examples.unit, np.int64) if filler else examples.lengths[samples]
    packed = len(samples) > len(packs) and not filler
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        starts=torch.tensor(starts or list(range(examples.unit))),
        lengths=torch.from_numpy(lengths),
        sample_ids=torch.from_numpy(samples if filler else examples.numbers[samples]),
        predict=torch.from_numpy(np.concatenate([empty, *predict])),
        targets=torch.from_numpy(np.concatenate([empty, *targets]).astype(np.int64)),
        labels=torch.from_numpy(samples if filler else examples.labels[samples]),
        sources=torch.from_numpy(np.zeros(examples.unit, np.int64) if filler else examples.sources[samples]),
        packs=lay_out(np.array(starts), lengths, len(packs), width) if packed else None,
        num_tokens=0 if filler else sum(widths),
        num_bytes=0 if filler else int(examples.num_bytes[samples].sum()),
        digest=digest,
        unit=examples.unit,
        step=step,
        index=index,
    )


def lay_out(starts: np.ndarray, lengths: np.ndarray, num_rows: int, width: int) -> Packs:
    """Where documents lie in rows of `width` tokens; the padding behind a row's last one counts as a document of its own."""
    size = num_rows * width
    bounds = np.union1d(np.concatenate([starts, starts + lengths]), np.arange(num_rows + 1) * width)
    spans = np.diff(bounds)
    positions = np.arange(size) - np.repeat(bounds[:-1], spans)
    # Padding takes the number of the document before it: nothing reads what it computes.
    documents = np.repeat(np.searchsorted(starts, bounds[:-1], side="right") - 1, spans)
    return Packs(
        positions=torch.from_numpy(positions.reshape(num_rows, width)),
        documents=torch.from_numpy(documents.reshape(num_rows, width)),
        bounds=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(spans.max()),
    )


@dataclass(frozen=True)
class Dealer:
    """Makes a window's micro-batches for one rank.

    Args:
        packed: whether the rows of a sequence share one row of the batch; else each has a row of its own.
        unpack: compute every unit of a pack apart; the steps have the same rows.
        shuffle: 0 for the longest micro-batch first; another number takes this rank's in a random order of that number, which
            changes nothing but the rounding of their sum.
    """

    batch_size: int
    micro_batch_size: int | None
    pad_id: int
    dp_rank: int
    dp_size: int
    device: torch.device
    unpack: bool = False
    packed: bool = True
    shuffle: int = 0

    def window(self, examples: Examples, packs: list[np.ndarray], step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        if self.unpack:
            packs = [unit for pack in packs for unit in pack.reshape(-1, examples.unit)]
        lengths = np.array([examples.lengths[p].sum() for p in packs])
        dealt = deal(np.arange(len(packs)), lengths, self.micro_batch_size, self.dp_rank, self.dp_size)
        if self.shuffle:
            dealt = [dealt[i] for i in np.random.default_rng([self.shuffle, step]).permutation(len(dealt))]
        groups = [(i, self._rows([packs[n] for n in numbers])) for i, numbers in dealt]
        return [collate(examples, group, self.pad_id, step, i).to(self.device) for i, group in groups]

    def _rows(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """What is laid out in each row of the batch."""
        if self.packed and not self.unpack:
            return sequences
        return [np.array([row]) for sequence in sequences for row in sequence]

    def longest(self, examples: Examples, rows: np.ndarray, bounds: np.ndarray) -> list[Batch]:
        """The most expensive micro-batch of some sequences, laid out as `Order.epoch` does."""
        if self.unpack:
            bounds = np.arange(0, len(rows) + 1, examples.unit)
        totals = np.add.reduceat(examples.lengths[rows], bounds[:-1])
        per_rank = -(-self.batch_size // self.dp_size)
        fullest = np.argsort(-totals, kind="stable")[: min(self.micro_batch_size or per_rank, per_rank)]
        packs = [rows[bounds[i] : bounds[i + 1]] for i in fullest]
        return [collate(examples, self._rows(packs), self.pad_id).to(self.device)]


class Loader(Protocol):
    """Yields a list of micro-batches per optimizer step, from the state's cursor to the last step.

    Attributes:
        digest: of what it reads; a resumed run must find the same.
        steps_per_epoch: of the first epoch; of the whole run where there is no epoch.
    """

    dealer: Dealer
    total_steps: int
    steps_per_epoch: int
    digest: str

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def advance(self) -> None:
        """The last window is done: move the state's cursor."""
        ...

    def fault(self) -> Exception | None:
        """What is wrong with this rank's part of the next window, while the ranks can still agree to end on it."""
        ...

    def longest(self) -> list[Batch]:
        """The most expensive micro-batch that can come, for a dry run: memory runs out now and not at step 200."""
        ...

    def places(self, samples: Sequence[int]) -> list[str]:
        """Where samples of the last window stand: file:line."""
        ...

    def waited(self) -> float:
        """Seconds for which windows were waited for since this was last asked."""
        ...

    def close(self) -> None:
        """Nothing more is read."""
        ...

    def describe(self) -> list[str]:
        """What packing, mixing and streaming make of the rows, to be said at the start."""
        ...


class TrainLoader:
    """Windows of rows that are all known: `Loader`."""

    def __init__(
        self, order: Order, state: TrainState, dealer: Dealer, epochs: int | None, max_steps: int | None
    ) -> None:
        self.order, self.state, self.dealer = order, state, dealer
        self.digest, self.steps_per_epoch = order.examples.digest, self.steps_in(0)
        self.total_steps = self._end(epochs, max_steps)
        self._ahead = Ahead(self._make)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch; packs fill differently in each."""
        return -(-self.order.num_sequences(epoch) // self.dealer.batch_size)

    def _end(self, epochs: int | None, max_steps: int | None) -> int:
        """The last step: the earlier of the two ends that are given."""
        if epochs is None:
            assert max_steps is not None, "config.check() requires one of the two"
            return max_steps
        if max_steps is not None and max_steps <= self.steps_per_epoch:
            return max_steps
        # Backwards, so that the first epoch's packs are those at hand when training begins.
        total = sum(self.steps_in(epoch) for epoch in reversed(range(epochs)))
        return total if max_steps is None else min(total, max_steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.state.step < self.total_steps:
            window = self._ahead.get(self._cursor())
            following = replace(self.state)
            following.advance(self.steps_in(following.epoch))
            if following.step < self.total_steps:
                self._ahead.begin(self._cursor(following))
            yield window

    def _cursor(self, state: TrainState | None = None) -> tuple[int, int, int]:
        """The step that comes next, and which window of which epoch it takes."""
        state = state or self.state
        return state.step + 1, state.epoch, state.window

    def _make(self, cursor: tuple[int, int, int]) -> list[Batch]:
        step, epoch, window = cursor
        rows, bounds = self.order.epoch(epoch)
        first = window * self.dealer.batch_size
        packs = [rows[a:b] for a, b in itertools.pairwise(bounds[first : first + self.dealer.batch_size + 1])]
        return self.dealer.window(self.order.examples, packs, step)

    def advance(self) -> None:
        self.state.advance(self.steps_in(self.state.epoch))

    def fault(self) -> Exception | None:
        try:
            if self.state.step < self.total_steps:
                self._ahead.get(self._cursor())
        except Exception as error:  # noqa: BLE001  returned, and raised once all know: alone, this rank would leave them waiting
            return error
        return None

    def longest(self) -> list[Batch]:
        if self.order.capacity is None:  # of all rows: a source of a mixture may leave some to later epochs
            count = len(self.order.examples)
            return self.dealer.longest(
                self.order.examples, np.arange(count), np.arange(0, count + 1, self.order.examples.unit)
            )
        return self.dealer.longest(self.order.examples, *self.order.epoch(self.state.epoch))

    def places(self, samples: Sequence[int]) -> list[str]:
        return [self.order.examples.place(s) for s in samples]

    def waited(self) -> float:
        return self._ahead.waited()

    def close(self) -> None:
        self._ahead.close()

    def describe(self) -> list[str]:
        if self.order.capacity is None:
            return []
        return [f"packing   {self.order.describe()}; with another packing, length or window it would be another run"]


def evaluation_batches(
    examples: Examples, batch_size: int, pad_id: int, dp_rank: int, dp_size: int, device: torch.device
) -> Iterator[Batch]:
    """Yield this rank's share of a split, each row once over all ranks, equally many batches on each rank."""
    lengths = examples.lengths.reshape(-1, examples.unit).sum(axis=1)
    units = np.argsort(-lengths, kind="stable")
    size = batch_size * dp_size
    for start in range(0, len(units), size):
        for index, group in deal(units[start : start + size], lengths, batch_size, dp_rank, dp_size):
            yield collate(examples, rows_of_units(group, examples.unit), pad_id, 0, index).to(device)
