"""Tokenized rows as Arrow columns, in memory or memory-mapped from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tritune.trainer.config.choices import Unsupervised
from tritune.trainer.data import remarks
from tritune.trainer.data.seal import Guard
from tritune.trainer.errors import InputError

NAMED = 3  # how many places a message lists
FEW = 50  # data.unsupervised=few leaves out at most one row in so many

# ids: the row's tokens. trained: [start, stop) pairs, flat, of positions whose tokens are predicted; never 0, before which
# nothing stands. num_bytes: UTF-8 length of what the predicted tokens spell (0 where not counted). full_length: tokens before
# the cut. digest: of the content, label left out (16 bytes).
SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.int32()),
        "label": pa.string(),
        "num_bytes": pa.int64(),
        "full_length": pa.int32(),
        "digest": pa.binary(16),
        "place": pa.string(),
    }
)


@dataclass
class DataReport:
    """What became of a source: shown at the start and written to `data.json`.

    Attributes:
        dropped, bad: rows without a supervised token, and rows that could not be read; `dropped_places` and `bad_places` have the
            first few, each with why.
        beyond: those of `dropped` whose answer lies beyond data.max_length.
        duplicates, too_long: rows left out by `data.duplicates` and `data.overlong`.
        stop_rows: rows in which a stop token is trained.
        columns: our name -> the file's, as the first row was read; `others` has, by our name, columns that could have been it.
        unread, unread_texts: what rows hold and nothing reads, by `column name` or `message key name`: in how many, and in how
            many it is words, lists or objects.
        remarks: what is said of rows that are kept, by kind (`remarks.Said`).
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    beyond: int = 0
    dropped_places: list[str] = field(default_factory=list)
    bad: int = 0
    bad_places: list[str] = field(default_factory=list)
    duplicates: int = 0
    too_long: int = 0
    stop_rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    unread_texts: dict[str, int] = field(default_factory=dict)
    remarks: remarks.Said = field(default_factory=dict)

    def ends_the_run(self, choice: Unsupervised, share: int | None = FEW) -> bool:
        """Whether the rows without a token to train on are too many, or no mere matter of length, for what the config chose.

        Args:
            share: under `few`, at most one row in so many; None where the rows are read bit by bit, and none is counted.
        """
        if not self.dropped or choice is Unsupervised.drop:
            return False
        few = self.dropped == self.beyond and (share is None or self.beyond * share <= self.rows)
        return choice is Unsupervised.refuse or not few

    def line(self) -> str:
        share = self.supervised_tokens / max(self.tokens, 1)
        parts = [f"{self.rows:,} rows", f"{self.tokens:,} tokens"]
        if self.supervised_tokens:
            parts.append(f"{share:.0%} supervised")
        if self.truncated_rows:
            parts.append(f"{self.truncated_rows:,} rows cut by {self.truncated_tokens:,} tokens")
        if answers := self.remarks.get(remarks.Kind.truncated_answers):
            count, places = answers["rows"], name_places(answers["places"], answers["rows"])
            parts.append(f"{count:,} of them in {'its answer' if count == 1 else 'their answers'}: {places}")
        if self.too_long:
            parts.append(f"{self.too_long:,} rows dropped as too long")
        if self.duplicates:
            parts.append(f"{self.duplicates:,} duplicates dropped")
        if self.dropped:
            places = name_places(self.dropped_places, self.dropped)
            parts.append(f"{self.dropped:,} rows dropped without a supervised token: {places}")
        if self.bad:
            parts.append(f"{self.bad:,} bad rows skipped: {name_places(self.bad_places, self.bad)}")
        return ", ".join(parts)


def joined(reports: Sequence[DataReport]) -> DataReport:
    """The sum of several."""
    whole = DataReport()
    for report in reports:
        for one in fields(DataReport):
            mine, value = getattr(whole, one.name), getattr(report, one.name)
            if one.name in ("columns", "others"):
                mine.update(value)
            elif one.name in ("unread", "unread_texts"):
                add_counts(mine, value)
            else:
                setattr(whole, one.name, remarks.joined(mine, value) if one.name == "remarks" else mine + value)
    return whole


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add counts by name to others, in place."""
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def name_places(places: Sequence[str], count: int) -> str:
    """The first few of `count` places."""
    return ", ".join(places[:NAMED]) + (f" and {count - NAMED:,} more" if count > NAMED else "")


class Columns:
    """Collects rows and makes an Arrow record batch of them."""

    def __init__(self) -> None:
        self._columns: dict[str, list] = {name: [] for name in SCHEMA.names}

    def add(
        self, ids: Sequence[int] | np.ndarray, trained: Sequence[tuple[int, int]], place: str, *,
        label: str | None = None, num_bytes: int = 0, full_length: int | None = None, digest: bytes = bytes(16),
    ) -> None:  # fmt: skip
        values = (ids, [x for span in trained for x in span], label, num_bytes, full_length or len(ids), digest, place)
        for name, value in zip(SCHEMA.names, values, strict=True):
            self._columns[name].append(value)

    def __len__(self) -> int:
        return len(self._columns["ids"])

    @property
    def places(self) -> list[str]:
        return self._columns["place"]

    def copy(self, other: Columns, row: int, digest: bytes) -> None:
        """Append a row of another, with a digest of its own."""
        for name, values in self._columns.items():
            values.append(digest if name == "digest" else other._columns[name][row])

    def batch(self) -> pa.RecordBatch:
        arrays = [pa.array(self._columns[field.name], field.type) for field in SCHEMA]
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


class Examples:
    """Tokenized rows, numbered from 0.

    Attributes:
        lengths, num_bytes: int64 [N].
        labels: int64 [N], classes; -1 where there is none.
        sources: int64 [N], numbers of the sources that rows came from: by default each table is one.
        numbers: int64 [N], of the samples: by default from 0 on.
        unit: how many consecutive rows are one unit, which is shuffled, packed and dealt whole.
        digest: SHA-256 of every token, span and label: two equal ones train the same.

    Args:
        tables: of `SCHEMA`, one a source, in order.
        labels: the label set, whose order numbers the classes.
        digests: of the tables, where they are known.
        guards: of the tables that are mapped, and of which tokens may have changed on the disk: `ids` raises `DamagedRows` then.
    """

    def __init__(
        self, tables: Sequence[pa.Table], labels: Sequence[str] = (), digests: Sequence[str] | None = None,
        report: DataReport | None = None, sources: np.ndarray | None = None, numbers: np.ndarray | None = None,
        guards: Sequence[Guard] = (), unit: int = 1,
    ) -> None:  # fmt: skip
        self.unit = unit
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        self.report = report or describe(self.table)
        self._ids = [flat(chunk) for chunk in self.table["ids"].chunks]
        self._trained = [flat(chunk) for chunk in self.table["trained"].chunks]
        self._first = np.cumsum([0] + [len(chunk) for chunk in self.table["ids"].chunks])
        lengths = [np.diff(offsets) for _, offsets in self._ids]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self.num_bytes = as_numpy(self.table["num_bytes"])
        self.label_set = list(labels)
        index = pc.index_in(self.table["label"], value_set=pa.array(list(labels), pa.string()))
        self.labels = as_numpy(pc.fill_null(index, -1)).astype(np.int64)
        by_table = np.repeat(np.arange(len(tables)), [len(t) for t in tables]).astype(np.int64)
        self.sources = by_table if sources is None else sources
        self.numbers = np.arange(len(self.lengths)) if numbers is None else numbers
        parts = digests if digests is not None else [table_digest(t) for t in tables]
        self.digest = parts[0] if len(parts) == 1 and not labels else _joined([*parts, *labels])
        self.guards = guards
        self._guards = [g for t, g in zip(tables, guards, strict=True) for _ in t["ids"].chunks] if guards else None

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """The tokens of a row, int32 [n]; a view.

        Raises:
            DamagedRows: they are not those that were written.
        """
        chunk, at = self._find(row)
        values, offsets = self._ids[chunk]
        found = values[offsets[at] : offsets[at + 1]]
        if self._guards is not None:
            self._guards[chunk].require(found)
        return found

    def require_whole(self) -> None:
        """Look at every token that was not looked at yet.

        Raises:
            DamagedRows: they are not those that were written.
        """
        for guard in self.guards:
            guard.require_all()

    def spans(self, row: int) -> np.ndarray:
        """[start, stop) of the positions whose tokens are predicted, int32 [k, 2]."""
        chunk, at = self._find(row)
        values, offsets = self._trained[chunk]
        return values[offsets[at] : offsets[at + 1]].reshape(-1, 2)

    def trained(self, row: int) -> np.ndarray:
        """Positions whose tokens are predicted, int64 [m], ascending."""
        spans = self.spans(row)
        if len(spans) == 1:
            return np.arange(spans[0, 0], spans[0, 1], dtype=np.int64)
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b, dtype=np.int64) for a, b in spans)])

    def some(self, rows: np.ndarray) -> Examples:
        """A few rows, in the order given."""
        taken = [self.table.take(pa.array(rows))]
        return Examples(
            taken, self.label_set, [""], DataReport(), self.sources[rows], self.numbers[rows], unit=self.unit
        )

    @staticmethod
    def join(parts: Sequence[Examples]) -> Examples:
        """Rows of several, which keep their numbers and sources."""
        if len(parts) == 1:
            return parts[0]
        sources, numbers = (np.concatenate([getattr(p, name) for p in parts]) for name in ("sources", "numbers"))
        return Examples(
            [p.table for p in parts], parts[0].label_set, [""], DataReport(), sources, numbers, unit=parts[0].unit
        )

    def place(self, row: int) -> str:
        """Where the row stands: file:line."""
        return self.table["place"][int(row)].as_py()

    def _find(self, row: int) -> tuple[int, int]:
        """The chunk of a row, and its number in it."""
        chunk = int(np.searchsorted(self._first, row, side="right")) - 1
        return chunk, int(row) - int(self._first[chunk])


def require_known_labels(examples: Examples, labels: Sequence[str]) -> None:
    """Refuse a row whose label is not among `labels`, where there are any.

    Raises:
        InputError: it names the row.
    """
    if labels and (examples.labels < 0).any():
        row = int(np.flatnonzero(examples.labels < 0)[0])
        rule = f"the label {examples.table['label'][row].as_py()!r} is not in the label set"
        known = f"{', '.join(labels[:5])}{' ...' if len(labels) > 5 else ''}"
        raise InputError(examples.place(row), rule, f"It has {known}: mend the row, or give data.labels")


def describe(table: pa.Table) -> DataReport:
    """Count rows, tokens and cuts of a table."""
    tokens, before, supervised = 0, 0, 0
    cut = 0
    for batch in table.to_batches():
        lengths = np.diff(flat(batch["ids"])[1])
        full = as_numpy(batch["full_length"])
        tokens, before, cut = tokens + int(lengths.sum()), before + int(full.sum()), cut + int((full > lengths).sum())
        values, offsets = flat(batch["trained"])
        spans = values[offsets[0] : offsets[-1]].reshape(-1, 2)
        supervised += int((spans[:, 1] - spans[:, 0]).sum())
    return DataReport(len(table), tokens, supervised, cut, before - tokens)


def table_digest(table: pa.Table) -> str:
    """SHA-256 over tokens, spans and labels, whatever the chunks."""
    digest = TableDigest()
    for batch in table.to_batches():
        digest.update(batch)
    return digest.hexdigest()


class TableDigest:
    """SHA-256 of a table's tokens, spans and labels as its batches come."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256() for _ in range(5)]

    def update(self, batch: pa.RecordBatch) -> None:
        for hashes, name in ((self._hashes[:2], "ids"), (self._hashes[2:4], "trained")):
            values, offsets = flat(batch[name])
            hashes[0].update(values[offsets[0] : offsets[-1]].data)
            hashes[1].update(np.diff(offsets).astype(np.int32).data)
        self._hashes[4].update("".join("\1" if x is None else f"{x}\0" for x in batch["label"].to_pylist()).encode())

    def hexdigest(self) -> str:
        return _joined([h.hexdigest() for h in self._hashes])


def _joined(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers without a null, [n]; an array's are a view. Arrow's own `to_numpy` imports pandas first, in 0.4 s."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert array.null_count == 0
    dtype, data = np.dtype(str(array.type)), array.buffers()[1]
    return np.frombuffer(data or b"", dtype, len(array), array.offset * dtype.itemsize if data else 0)


def flat(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list array, without a copy."""
    return as_numpy(chunk.values), as_numpy(chunk.offsets)
