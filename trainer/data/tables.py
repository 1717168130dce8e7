"""Pieces -> one table for each split: divided, freed of duplicates, joined to blocks for pre-training, counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from tritune.trainer.config.choices import BadRows, Duplicates, Overlong
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data import remarks
from tritune.trainer.data.columns import named_columns
from tritune.trainer.data.encoded import BEYOND
from tritune.trainer.data.examples import (
    FEW,
    NAMED,
    SCHEMA,
    Columns,
    DataReport,
    TableDigest,
    add_counts,
    as_numpy,
    describe,
    name_places,
)
from tritune.trainer.data.pipeline import Piece, Source
from tritune.trainer.errors import InputError, some_names
from tritune.trainer.redact import redact_tree

REJECTS = "rejects.jsonl"
REJECTS_AT_ONCE = 10_000  # so many are searched for secrets together


class Sink:
    """Collects the rows of one split: counted, hashed, in batches ready to be written.

    Args:
        block: join the rows to one stream of tokens and cut it into blocks of so many; None keeps rows.
        stride: tokens that a block repeats of the one before.
    """

    def __init__(self, block: int | None, stride: int) -> None:
        self.report, self.digest = DataReport(), TableDigest()
        self._joiner = None if block is None else Blocks(block, stride)

    def take(self, batch: pa.RecordBatch, token_bytes: list[np.ndarray]) -> pa.RecordBatch:
        """Count rows, joined to blocks where that is asked for; return what is to be written."""
        return self._counted(batch if self._joiner is None else self._joiner.add(batch, token_bytes))

    def end(self) -> pa.RecordBatch:
        """What the joiner still holds."""
        return self._counted(Columns().batch() if self._joiner is None else self._joiner.end())

    def _counted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        part = describe(pa.Table.from_batches([batch]))
        for name in ("rows", "tokens", "supervised_tokens", "truncated_rows", "truncated_tokens"):
            setattr(self.report, name, getattr(self.report, name) + getattr(part, name))
        self.digest.update(batch)
        return batch


class Blocks:
    """Documents as one stream, cut into blocks of `length` tokens of which every one but the first is predicted.

    With a stride a block begins with the last tokens of the one before, which are read and not trained again.
    """

    def __init__(self, length: int, stride: int) -> None:
        self.length, self.stride, self.number = length, stride, 0
        self._ids, self._bytes = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def add(self, batch: pa.RecordBatch, token_bytes: list[np.ndarray]) -> pa.RecordBatch:
        """Append documents; return the blocks that are full."""
        self._ids = np.concatenate([self._ids, as_numpy(batch["ids"].flatten())])
        self._bytes = np.concatenate([self._bytes, *token_bytes])
        return self._cut(last=False)

    def end(self) -> pa.RecordBatch:
        """The rest."""
        return self._cut(last=True)

    def _cut(self, last: bool) -> pa.RecordBatch:
        columns, start = Columns(), 0
        step = self.length - self.stride
        while len(self._ids) - start >= (2 if last else self.length):
            stop = min(start + self.length, len(self._ids))
            trained = 1 if self.number == 0 else max(self.stride, 1)
            if stop - start > trained:
                spelled = int(self._bytes[start + trained : stop].sum())
                place = f"block {self.number}"
                columns.add(self._ids[start:stop], [(trained, stop - start)], place, num_bytes=spelled)
            self.number += 1
            start += step
            if stop == len(self._ids) and last:
                break
        self._ids, self._bytes = self._ids[start:], self._bytes[start:]
        return columns.batch()


class Divider:
    """Sends each row to its split, and counts what is left out.

    Attributes:
        sinks: by split; what was counted and hashed.

    Args:
        shares: split -> its share of the rows, in order; what is left over is `train`.
        write: takes (split, batch), in order.
        reject: takes (place, fate, why) of each row that is left out.
        groups: of rows that are nearly the same, by place: of each group the first row that can be trained on is kept.
    """

    def __init__(
        self, shares: dict[str, float], data: DataConfig, block: int | None,
        write: Callable[[str, pa.RecordBatch], None], reject: Callable[[str, str, str], None],
        groups: Mapping[str, int] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.sinks = {name: Sink(block, data.stride) for name in ("train", *shares)}
        self._names, self._edges = [*shares, "train"], np.cumsum(list(shares.values()))
        self._data, self._write, self._reject, self._groups = data, write, reject, groups
        self._seen: set[tuple[bytes, str | None]] = set()
        self._owners: dict[int, str] = {}  # of groups: the row that is kept

    def take(self, piece: Piece | InputError) -> None:
        """The next rows of the source, or a fault of one of its files.

        Raises:
            InputError: a bad row, where the config refuses these.
        """
        self._lose(piece)
        if isinstance(piece, InputError):
            return
        # The first share takes the points below it, the next those above: a row stays where it is when a later share grows.
        belongs = np.searchsorted(self._edges, piece.points, side="right")
        keep_all = self._data.duplicates is Duplicates.keep
        kept = np.ones(len(belongs), bool) if keep_all else self._first_ones(piece, belongs)
        for number, name in enumerate(self._names):
            mine, sink = kept & (belongs == number), self.sinks[name]
            sink.report.duplicates += int((~kept & (belongs == number)).sum())
            batch = piece.batch if mine.all() else piece.batch.filter(pa.array(mine))
            sink.report.stop_rows += int(piece.stops[mine].sum())
            for remark in piece.remarks:
                if mine[remark.row]:
                    place = piece.batch["place"][remark.row].as_py()
                    remarks.add(sink.report.remarks, remark.kind, place, remark.parts)
            token_bytes = [piece.token_bytes[i] for i in np.flatnonzero(mine)] if piece.token_bytes else []
            self._pass_on(name, sink.take(batch, token_bytes))

    def end(self) -> None:
        """The source has ended."""
        for name, sink in self.sinks.items():
            self._pass_on(name, sink.end())

    def _pass_on(self, name: str, batch: pa.RecordBatch) -> None:
        if len(batch):
            self._write(name, batch)

    def _first_ones(self, piece: Piece, belongs: np.ndarray) -> np.ndarray:
        """Which rows repeat none of those that were kept before, in the source's order and whatever their splits, bool [n]."""
        first = np.ones(len(belongs), bool)
        columns = [piece.batch[name].to_pylist() for name in ("digest", "label", "place")]
        for i, (digest, label, place) in enumerate(zip(*columns, strict=True)):
            whole = piece.wholes.get(place, place)
            group = self._groups.get(whole)
            turn = i and place == columns[2][i - 1] and belongs[i] == belongs[i - 1]  # not the next part of a text
            if turn:  # turns of one conversation stay together
                first[i] = first[i - 1]
                if not first[i]:
                    self._reject(place, "duplicate", "the row that it was made of is left out")
            elif (digest, label) in self._seen:
                self._reject(place, "duplicate", "its content and label stand earlier in the source")
                first[i] = False
            elif group is not None and self._owners.get(group, whole) != whole:
                self._reject(place, "near duplicate", "it nearly repeats an earlier row of the source")
                first[i] = False
            else:
                self._seen.add((digest, label))
                if group is not None:
                    self._owners[group] = whole
        return first

    def _lose(self, piece: Piece | InputError) -> None:
        """Count rows that were not encoded; they belong to no split, and are reported with the training rows."""
        report = self.sinks["train"].report
        bad = [piece] if isinstance(piece, InputError) else piece.bad
        if bad and self._data.bad_rows is BadRows.refuse:
            raise bad[0]
        for error in bad:
            self._reject(error.value, "bad", error.rule)
        report.bad += len(bad)
        report.bad_places += [error.value for error in bad][: NAMED - len(report.bad_places)]
        if isinstance(piece, InputError):
            return
        for place in piece.dropped:
            self._reject(place, "unsupervised", "it has no token to train on")
        for place in piece.too_long:
            self._reject(place, "too long", f"it has more than data.max_length={self._data.max_length} tokens")
        report.dropped += len(piece.dropped)
        report.beyond += sum(place.endswith(BEYOND) for place in piece.dropped)
        report.dropped_places += piece.dropped[: NAMED - len(report.dropped_places)]
        report.too_long += len(piece.too_long)
        add_counts(report.unread, piece.unread.rows)
        add_counts(report.unread_texts, piece.unread.texts)


def require_columns(source: Source, seen: set[str]) -> None:
    """Refuse a source that has no row with a column that the config names.

    Raises:
        InputError: it names the column.
    """
    for key, column in named_columns(source.data, source.key).items():
        if column not in seen:
            rule = f"no row of {source.path} has the column {column}"
            raise InputError(f"{key}={column}", rule, f"Name one of the first row's: {some_names(source.names)}")


def require_supervision(reports: dict[str, DataReport], data: DataConfig, share: int | None = FEW) -> None:
    """Refuse a source of which rows, or all, train nothing.

    Args:
        share: as in `DataReport.ends_the_run`.

    Raises:
        InputError: it names the first such rows.
    """
    kept, lost = sum(r.rows for r in reports.values()), reports["train"]
    if lost.ends_the_run(data.unsupervised, share) or (lost.dropped and not kept):
        count = (
            "every row has"
            if not kept
            else f"{lost.dropped:,} of {lost.dropped + kept:,} rows {'has' if lost.dropped == 1 else 'have'}"
        )
        remedy = f"Mend them, raise data.max_length={data.max_length}"
        if any(BEYOND in place for place in lost.dropped_places) and data.overlong is Overlong.cut:
            remedy += ", cut what is asked instead: data.overlong=cut_prompt_start"
        remedy += ", or drop them: data.unsupervised=drop" if kept else ", or check the chat template"
        places = name_places(lost.dropped_places, lost.dropped)
        raise InputError(places, f"{count} no token to train on", remedy)


class TableFiles:
    """The files of a cache entry while it is built: `<split>.arrow`, and `rejects.jsonl` with every row that was left out."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._files = {name: (folder / f"{name}.arrow").open("wb") for name in names}
        self._writers = {name: pa.ipc.new_file(file, SCHEMA) for name, file in self._files.items()}
        self._rejects = (folder / REJECTS).open("w", encoding="utf-8")
        self._waiting: list[dict[str, str]] = []  # rejects that are not yet written

    def __enter__(self) -> TableFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), self._rejects):
            file.close()

    def write(self, name: str, batch: pa.RecordBatch) -> None:
        self._writers[name].write_batch(batch)

    def reject(self, place: str, fate: str, why: str) -> None:
        self._waiting.append({"place": place, "fate": fate, "why": why})
        if len(self._waiting) == REJECTS_AT_ONCE:
            self._write_rejects()

    def _write_rejects(self) -> None:
        rows = redact_tree(self._waiting)  # a run copies the file as it is
        self._rejects.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._waiting = []

    def finish(self, sinks: dict[str, Sink]) -> dict[str, Any]:
        """Bring everything to disk; return each table's digest and report."""
        self._write_rejects()
        for writer in self._writers.values():
            writer.close()
        for file in (*self._files.values(), self._rejects):
            file.flush()
            os.fsync(file.fileno())
        return {n: {"digest": s.digest.hexdigest(), "report": asdict(s.report)} for n, s in sinks.items()}
