"""A loader over windows of a stream: no epoch, nothing held but the window and the one being made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tritune.trainer.batch import Batch
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import Dealer
from tritune.trainer.data.stream import Stream, Window
from tritune.trainer.data.unread import listed
from tritune.trainer.run.state import TrainState


class StreamLoader:
    """Windows of rows that are read as training goes on: `Loader`.

    The cursor is the window in which the last sequence lay, (passes, rows) read of each source before it, and how many of its
    sequences were taken. A step may reach over several windows.

    Args:
        say: is told of rows that a window leaves out.
    """

    def __init__(
        self,
        stream: Stream,
        state: TrainState,
        dealer: Dealer,
        total_steps: int,
        digest: str,
        say: Callable[[str], None],
    ) -> None:
        self.stream, self.state, self.dealer, self.total_steps = stream, state, dealer, total_steps
        self.steps_per_epoch, self.digest, self._say = total_steps, digest, say
        if not state.sources:
            state.sources = [[0, 0] for _ in stream.sources]
        self._window: Window | None = None
        self._next: tuple[int, list[list[int]], int, int] = (0, [], 0, 0)
        self._step: Examples | None = None
        self._seconds = 0.0

    @property
    def window(self) -> Window:
        """The one in which the cursor lies."""
        if self._window is None or self._window.number != self.state.window:
            self._window = self.stream.get(self.state.window, [(a, b) for a, b in self.state.sources])
        return self._window

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.state.step < self.total_steps:
            began = time.perf_counter()
            self._step, packs = self._take()
            window = self.dealer.window(self._step, packs, self.state.step + 1)
            self._seconds += time.perf_counter() - began
            yield window

    def _take(self) -> tuple[Examples, list[np.ndarray]]:
        """The rows of a step, and its sequences as numbers among them."""
        window, used, sources, wanted = self.window, self.state.used, self.state.sources, self.dealer.batch_size
        left_out = self.state.left_out
        parts, packs, rows = [], [], 0
        if used == 0:
            left_out += self._lost(window)
        while wanted:
            while used == len(window.sequences):
                sources, used = [list(at) for at in window.after], 0
                window = self._window = self.stream.get(window.number + 1, window.after)
                left_out += self._lost(window)
            taken = window.sequences[used : used + wanted]
            parts.append(window.examples.some(np.concatenate(taken)))
            for pack in taken:
                packs.append(rows + np.arange(len(pack)))
                rows += len(pack)
            wanted, used = wanted - len(taken), used + len(taken)
        self._next = (window.number, sources, used, left_out)
        return Examples.join(parts), packs

    def _lost(self, window: Window) -> int:
        """How many rows of a window that is begun are left out; it is said."""
        if window.lost:
            self._say(f"data      window {window.number}: {window.examples.report.line()}")
        return window.lost

    def advance(self) -> None:
        self.state.step += 1
        self.state.window, self.state.sources, self.state.used, self.state.left_out = self._next

    def fault(self) -> None:
        """None: rows that were tokenized just now were never on a disk."""

    def waited(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        self.stream.close()

    def longest(self) -> list[Batch]:
        window = self.window
        while not window.sequences:
            window = self.stream.get(window.number + 1, window.after)
        rows = np.concatenate(window.sequences)
        bounds = np.concatenate([[0], np.cumsum([len(s) for s in window.sequences])])
        return self.dealer.longest(window.examples, rows, bounds)

    def places(self, samples: Sequence[int]) -> list[str]:
        assert self._step is not None, "a window was trained on"
        numbers = self._step.numbers.tolist()
        return [self._step.place(numbers.index(s)) for s in samples]

    def describe(self) -> list[str]:
        window = self.window
        packed = f" in {len(window.sequences):,} sequences" if len(window.sequences) < len(window.examples) else ""
        unread = window.examples.report.unread
        return [f"stream    not read there: {listed(unread)}"] * bool(unread) + [
            f"stream    {len(self.stream.sources)} source(s), shuffled within windows of {self.stream.window:,} rows; the "
            f"{'first' if window.number == 0 else 'next'}: {window.examples.report.line()}{packed}"
        ]
