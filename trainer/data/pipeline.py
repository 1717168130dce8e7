"""A source -> tokenized tables: read here, encoded by several processes, written in the order of the source."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.choices import Kind
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.chunks import Chunk, Row
from tritune.trainer.data.columns import Layout
from tritune.trainer.data.encoded import Encoded, Encoder
from tritune.trainer.data.held_out import Ends, records_in
from tritune.trainer.data.kinds import Reading, Record, as_records
from tritune.trainer.data.records import read_all, read_chunks
from tritune.trainer.data.remarks import Remark
from tritune.trainer.data.unread import KeyReader, Unread
from tritune.trainer.data.workers import in_order
from tritune.trainer.errors import InputError


@dataclass(frozen=True)
class Piece:
    """What one chunk became; small enough to be sent between processes.

    Attributes:
        batch: rows of `examples.SCHEMA`.
        points, stops: float64 and bool, one a row.
        token_bytes: of each token, one list a row; empty unless the objective reads text.
        seen: columns named in the config that some row had.
        unread: what rows hold and nothing reads.
        remarks: of rows of the batch.
        wholes: place -> that of the row that it is a part of, where they differ.
    """

    batch: pa.RecordBatch
    points: np.ndarray
    stops: np.ndarray
    token_bytes: list[np.ndarray]
    bad: list[InputError]
    dropped: list[str]
    too_long: list[str]
    seen: set[str]
    unread: Unread
    remarks: list[Remark] = field(default_factory=list)
    wholes: dict[str, str] = field(default_factory=dict)


@dataclass
class Source:
    """What is read, and how its rows are understood and encoded.

    Attributes:
        path, key: as in the config, for messages.
        kind, names, layout: settled by `settle`, before any process is forked: of its rows, the columns of the first and how
            they are read.
        keys: finds out which keys of messages the chat template reads; None where nothing is rendered.
        ends: where the held-out parts of its files begin; None where the content of each row says where it falls.
    """

    path: str
    key: str
    data: DataConfig
    objective: ObjectiveConfig
    encoder: Encoder
    kind: Kind | None = None
    names: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout)
    keys: KeyReader | None = None
    ends: Ends | None = None

    def settle(self) -> None:
        """Find out what kind of rows the source has, from its first good one.

        Raises:
            InputError: the first row has none of the columns that the objective reads.
        """
        for row in read_all(self.path, self.key, self.data.text_unit):
            if not isinstance(row, InputError):
                reading = Reading(self.data, self.objective, key=self.key)
                self.layout = reading.layout(row)
                self.kind, self.names = reading.kind, tuple(row.fields)
                return

    def piece(self, chunk: Chunk) -> Piece:
        """Parse and encode a chunk."""
        reading = Reading(self.data, self.objective, self.kind, self.key)
        return self._encoded(records_in(chunk, reading, self.ends), reading)

    def piece_or_fault(self, chunk: Chunk | InputError) -> Piece | InputError:
        """What became of a chunk; a file's fault stays what it is."""
        return chunk if isinstance(chunk, InputError) else self.piece(chunk)

    def encoded(self, rows: Iterable[Row | InputError]) -> Piece:
        """Encode rows; faults, and rows that are no records, are kept apart."""
        reading = Reading(self.data, self.objective, self.kind, self.key)
        return self._encoded(as_records(rows, reading), reading)

    def _encoded(self, found: Iterable[Record | InputError], reading: Reading) -> Piece:
        records, bad = [], []
        for record in found:
            if isinstance(record, InputError):
                bad.append(record)
            else:
                records.append(record)
        if self.keys is not None:
            self.keys.count(records, reading.unread)
        return pack_piece(self.encoder(records), bad, reading.seen, reading.unread)


def pack_piece(encoded: Encoded, bad: list[InputError], seen: set[str], unread: Unread) -> Piece:
    return Piece(
        encoded.columns.batch(), np.array(encoded.points, np.float64), np.array(encoded.stops, bool),
        encoded.token_bytes, bad + encoded.bad, encoded.dropped, encoded.too_long, seen, unread,
        encoded.remarks, encoded.wholes,
    )  # fmt: skip


def encode_records(records: Sequence[Record], encoder: Encoder) -> Piece:
    """Records that are in memory already."""
    return pack_piece(encoder(records), [], set(), Unread())


def pieces(source: Source, num_procs: int) -> Iterator[Piece | InputError]:
    """Yield what the chunks of a source became, in its order; a fault of a file in its place.

    Args:
        num_procs: processes that parse and encode; they are started when there is work for two.
    """
    chunks = read_chunks(source.path, source.key, source.data.text_unit)
    ahead = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(ahead, chunks)
    if num_procs < 2 or len(ahead) < 2:
        yield from map(source.piece_or_fault, chunks)
    else:
        yield from in_order(source.piece_or_fault, chunks, num_procs)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
