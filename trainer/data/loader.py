"""One global order of samples, and from it each rank's micro-batches.

The order of an epoch is a function of (seed, epoch). A window is `train.batch_size` consecutive samples of it: one optimizer
step. Within a window rows are sorted by length, cut into micro-batches and dealt to the ranks in turn; where the count does
not divide, empty micro-batches of weight 0 fill up, so that all ranks run equally many collectives. A job resumed with
another number of ranks sees exactly the samples it would have seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tritune.trainer.batch import Batch
from tritune.trainer.data.examples import Examples
from tritune.trainer.state import TrainState


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch, int64 [num_samples].

    Samples are sorted by a hash (SplitMix64, Steele et al. 2014) and not by a library's generator: a new version of
    NumPy or PyTorch cannot reorder a run that is resumed under it.
    """
    with np.errstate(over="ignore"):
        stream = _splitmix(np.uint64(seed & (2**64 - 1))) ^ _splitmix(np.uint64(epoch) + np.uint64(0x5851F42D4C957F2D))
        keys = _splitmix(np.arange(num_samples, dtype=np.uint64) + _splitmix(stream))
    return np.argsort(keys, kind="stable")


def _splitmix(x):
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def deal(
    rows: np.ndarray, lengths: np.ndarray, micro_batch_size: int | None, dp_rank: int, dp_size: int
) -> list[tuple[int, np.ndarray]]:
    """Return this rank's micro-batches of a window as (index in the window, sample numbers); empty ones fill.

    Args:
        rows: sample numbers of the window, in the global order.
        lengths: tokens of every sample of the data set.
        micro_batch_size: rows per micro-batch at most; None for as many as fall to a rank.
    """
    per_rank = -(-len(rows) // dp_size)
    size = min(micro_batch_size or per_rank, per_rank)
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    groups = [by_length[i : i + size] for i in range(0, len(rows), size)]
    groups += [rows[:0]] * (-len(groups) % dp_size)
    return [(i, groups[i]) for i in range(dp_rank, len(groups), dp_size)]


def collate(examples: Examples, rows: Sequence[int] | np.ndarray, pad_id: int, step: int = 0, index: int = 0) -> Batch:
    """Build a `Batch` from sample numbers; without any, one padding token of weight 0."""
    lengths = [int(examples.lengths[r]) for r in rows] or [1]
    width = max(lengths)
    input_ids = np.full((len(lengths), width), pad_id, dtype=np.int64)
    predict, targets, digest = [], [], 0
    for b, r in enumerate(rows):
        start, n = examples.starts[r], lengths[b]
        input_ids[b, :n] = examples.ids[start : start + n]
        wanted = np.flatnonzero(examples.supervised[start + 1 : start + n])  # position t predicts token t + 1
        predict.append(b * width + wanted)
        targets.append(input_ids[b, wanted + 1])
        digest += zlib.crc32(input_ids[b, :n].tobytes() + wanted.tobytes(), int(r))
    empty = np.zeros(0, np.int64)
    filler = len(rows) == 0
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.tensor(lengths),
        sample_ids=torch.tensor([-1] if filler else [int(r) for r in rows]),
        predict=torch.from_numpy(np.concatenate([empty, *predict])),
        targets=torch.from_numpy(np.concatenate([empty, *targets])),
        labels=torch.tensor([-1] if filler else [int(examples.labels[r]) for r in rows]),
        num_tokens=0 if filler else sum(lengths),
        num_bytes=int(sum(examples.num_bytes[r] for r in rows)),
        digest=digest,
        step=step,
        index=index,
    )


class TrainLoader:
    """Yields a list of micro-batches per optimizer step, from the state's cursor to the last step.

    Args:
        order: 0 for the longest micro-batch first; another number takes this rank's in a random order of that number, which
            changes nothing but the rounding of their sum.
    """

    def __init__(
        self, examples: Examples, state: TrainState, *, seed: int, batch_size: int, micro_batch_size: int | None,
        total_steps: int, pad_id: int, dp_rank: int, dp_size: int, device: torch.device, order: int = 0,
    ) -> None:  # fmt: skip
        self.examples, self.state = examples, state
        self.seed, self.batch_size, self.micro_batch_size = seed, batch_size, micro_batch_size
        self.total_steps, self.pad_id = total_steps, pad_id
        self.dp_rank, self.dp_size, self.device, self.order = dp_rank, dp_size, device, order
        self.steps_per_epoch = -(-len(examples) // batch_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        epoch, order = -1, np.zeros(0, np.int64)
        while self.state.step < self.total_steps:
            if self.state.epoch != epoch:
                epoch, order = self.state.epoch, epoch_order(len(self.examples), self.seed, self.state.epoch)
            start = self.state.window * self.batch_size
            yield self._window(order[start : start + self.batch_size])

    def longest(self) -> list[Batch]:
        """The most expensive micro-batch that can come, for a dry run: memory runs out now and not at step 200."""
        per_rank = -(-self.batch_size // self.dp_size)
        size = min(self.micro_batch_size or per_rank, per_rank, len(self.examples))
        rows = np.argsort(-self.examples.lengths, kind="stable")[:size]
        return [collate(self.examples, rows, self.pad_id).to(self.device)]

    def _window(self, rows: np.ndarray) -> list[Batch]:
        dealt = deal(rows, self.examples.lengths, self.micro_batch_size, self.dp_rank, self.dp_size)
        step = self.state.step + 1
        if self.order:
            dealt = [dealt[i] for i in np.random.default_rng([self.order, step]).permutation(len(dealt))]
        return [collate(self.examples, group, self.pad_id, step, i).to(self.device) for i, group in dealt]


def evaluation_batches(
    examples: Examples, batch_size: int, pad_id: int, dp_rank: int, dp_size: int, device: torch.device
) -> Iterator[Batch]:
    """Yield this rank's share of a split, each row once over all ranks, equally many batches on each rank."""
    rows = np.argsort(-examples.lengths, kind="stable")
    size = batch_size * dp_size
    for start in range(0, len(rows), size):
        for index, group in deal(rows[start : start + size], examples.lengths, batch_size, dp_rank, dp_size):
            yield collate(examples, group, pad_id, 0, index).to(device)
