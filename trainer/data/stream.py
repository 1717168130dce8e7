"""Sources that are read while training goes on, and never held whole.

The global order is cut into windows of `data.pack_window` rows. Which source each row of a window comes from is a function of
(seed, its number); each source is read in the order of its files, over and over. Within its window rows are shuffled, by
(seed, window), and packed: the window is the shuffle buffer. So a window is rebuilt by reading it again, from the row of each
source at which it begins, and nothing else of it is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tritune.trainer.config.choices import Packing
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.chunks import Chunk, Row, parse_chunk
from tritune.trainer.data.examples import FEW, DataReport, Examples, joined, require_known_labels
from tritune.trainer.data.order import epoch_order, packed_window, rows_of_units, uniform
from tritune.trainer.data.pipeline import Source
from tritune.trainer.data.records import read_chunks
from tritune.trainer.data.remarks import require_rendered
from tritune.trainer.data.tables import Divider, require_columns, require_supervision
from tritune.trainer.errors import InputError


@dataclass(frozen=True)
class Window:
    """Consecutive rows of the global order, tokenized.

    Attributes:
        examples: its rows; `numbers` are theirs in the stream.
        sequences: rows, or packs of them, in the order in which they are trained; none where every row was left out.
        after: (passes, rows) read of each source when it was made: where the next window begins.
    """

    number: int
    examples: Examples
    sequences: list[np.ndarray]
    after: list[tuple[int, int]]

    @property
    def lost(self) -> int:
        """How many of its rows are not trained on."""
        report = self.examples.report
        return report.bad + report.dropped + report.too_long


class Stream:
    """Windows, one after the other; the next is made while one is trained on.

    Args:
        shares: of the sources, adding up to 1.
        labels: of a classifier; given, for they cannot be collected.
    """

    def __init__(
        self, sources: Sequence[Source], shares: Sequence[float], labels: Sequence[str], seed: int, window: int
    ) -> None:
        self.sources, self.labels, self.seed, self.window = list(sources), list(labels), seed, window
        self._edges = np.cumsum(shares)[:-1]
        self._ahead: tuple[int, Future[Window]] | None = None
        self._pool = ThreadPoolExecutor(1, "window")
        self._readers: list[Rewinding] = []
        self._fruitful: list[int] | None = None  # passes of each source when a row was last kept

    def get(self, number: int, at: list[tuple[int, int]]) -> Window:
        """Return a window; the one behind it is begun.

        Args:
            at: (passes, rows) read of each source before it.

        Raises:
            InputError: a bad row, or one without a supervised token, where the config refuses these; no row of the sources
                can be trained on.
        """
        if self._ahead is not None and self._ahead[0] == number:
            window = self._ahead[1].result()
        else:
            window = self._pool.submit(self._make, number, at).result()
        if self._ahead is None or self._ahead[0] <= number:
            self._ahead = (number + 1, self._pool.submit(self._make, number + 1, window.after))
        return window

    def _numbers(self, number: int, count: int) -> np.ndarray:
        """Of a window's rows; turns that became rows of their own can make them more than were read."""
        places = np.arange(count)
        return np.where(places < self.window, number * self.window + places, (1 << 40) + (number << 20) + places)

    def close(self) -> None:
        """Make no more. What is being made is not waited for: a read may hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, number: int, at: list[tuple[int, int]]) -> Window:
        if [reader.at for reader in self._readers] != at:
            self._readers = [Rewinding(source, a) for source, a in zip(self.sources, at, strict=True)]
        first = number * self.window
        chosen = np.searchsorted(self._edges, uniform(first, self.window, self.seed), side="right")
        counts = np.bincount(chosen, minlength=len(self.sources)).tolist()
        batches, reports, owners = [], [], []
        seen: list[set[str]] = []
        for owner, (source, reader, count) in enumerate(zip(self.sources, self._readers, counts, strict=True)):
            made, report, columns = encode(source, reader.take(count))
            seen.append(columns)
            batches += made
            owners += [owner] * sum(len(b) for b in made)
            reports.append(report)
        examples = Examples(
            [pa.Table.from_batches(batches)] if batches else [], self.labels, [""], joined(reports),
            np.array(owners, np.int64), self._numbers(number, len(owners)), unit=self.sources[0].objective.documents,
        )  # fmt: skip
        require_known_labels(examples, self.labels)
        if number == 0:
            if examples.report.rows + examples.report.dropped >= FEW:  # the share says nothing of fewer
                require_supervision({"train": examples.report}, self.sources[0].data)
            for source, columns, count in zip(self.sources, seen, counts, strict=True):
                if count:  # of one with a small share there may be no row yet
                    require_columns(source, columns | set(source.names))
        data, passes = self.sources[0].data, [reader.at[0] for reader in self._readers]
        if len(examples) or self._fruitful is None:
            self._fruitful = passes
        if not len(examples) and all(now > then + 1 for now, then in zip(passes, self._fruitful, strict=True)):
            names = ", ".join(f"{s.key}={s.path}" for s in self.sources)
            rule = f"in a whole pass no row can be trained on; the last: {examples.report.line()}"
            raise InputError(names, rule, "Check the rows, or run tritune audit")
        return Window(number, examples, sequences_of(examples, data, self.seed, number), [r.at for r in self._readers])


class Rewinding:
    """Rows of a source from some point on, pass after pass, without an end.

    Attributes:
        at: (passes, rows of this pass) that were read.
    """

    def __init__(self, source: Source, at: tuple[int, int]) -> None:
        self.source, self.at = source, at
        self._chunks = self._open(at[1])
        self._rows: Iterator[Row | InputError] = iter(())

    def take(self, count: int) -> list[Row | InputError]:
        """The next `count` rows, good and bad; a file's fault comes with them and is not counted.

        Raises:
            InputError: the source holds no row.
        """
        taken: list[Row | InputError] = []
        while count:
            row = next(self._rows, None)
            if row is not None:
                taken.append(row)
                self.at = (self.at[0], self.at[1] + 1)
                count -= 1
                continue
            chunk = next(self._chunks, None)
            if isinstance(chunk, Chunk):
                self._rows = parse_chunk(chunk)
            elif chunk is not None:
                taken.append(chunk)
            elif self.at[1] == 0:
                said = next((str(t) for t in taken if isinstance(t, InputError)), "the source holds no row")
                raise InputError(f"{self.source.key}={self.source.path}", said, "Give one with rows")
            else:
                self.at = (self.at[0] + 1, 0)
                self._chunks = self._open(0)
        return taken

    def _open(self, skip: int) -> Iterator[Chunk | InputError]:
        return read_chunks(self.source.path, self.source.key, self.source.data.text_unit, skip)


def encode(source: Source, rows: Sequence[Row | InputError]) -> tuple[list[pa.RecordBatch], DataReport, set[str]]:
    """Tokenize rows of one source, under its rules for bad ones; also which of the columns that the config names they have.

    Raises:
        InputError: what these rules refuse.
    """
    batches: list[pa.RecordBatch] = []
    divider = Divider({}, source.data, None, lambda _, batch: batches.append(batch), lambda *_: None)
    piece = source.encoded(rows)
    divider.take(piece)
    divider.end()
    report = divider.sinks["train"].report
    if report.ends_the_run(source.data.unsupervised, None):  # a window may have no other rows
        require_supervision({"train": report}, source.data, None)
    require_rendered(report.remarks, report.rows, source.data)
    return batches, report, piece.seen


def sequences_of(examples: Examples, data: DataConfig, seed: int, number: int) -> list[np.ndarray]:
    """Shuffle a window's rows, and pack them where that is asked for."""
    order = epoch_order(len(examples) // examples.unit, seed, number)
    units = rows_of_units(order, examples.unit).reshape(-1, examples.unit)
    if data.packing is Packing.none or not len(order):
        return list(units)
    rows, counts = packed_window(units, examples.lengths, data.max_length * examples.unit, seed, number + (1 << 32))
    return np.split(rows, np.cumsum(counts)[:-1])
