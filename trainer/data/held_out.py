"""Held-out parts that are the end of each file, whole, so that neighbours of a text do not lie on both sides.

A file is read once to measure it, in characters of text for pre-training and in rows for what is asked and answered. Its first
part is trained on, then comes the validation, then the test. A part begins with a row; where the nearest row lies far off, as in
a book that is one row, the row's text is cut at the end of a paragraph, a line, a sentence or a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import HeldOut, TextUnit
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.chunks import Chunk, parse_chunk
from tritune.trainer.data.files import format_of, is_saved, source_files
from tritune.trainer.data.kinds import Reading, Record, as_records
from tritune.trainer.data.records import read_chunks
from tritune.trainer.errors import InputError

MOVED = 0.5  # of the smallest part: so far an edge moves to the beginning of a row
NEAR = 0.1  # of the smallest part: so far it moves within a row to the end of something larger than a word
REPAID = (
    0.25  # of the smallest part: so far an edge moves for those of other files; two that meet would cut a text twice
)
LEAST = 200  # characters of the smallest part below which no row is cut
_ENDS = (r"\n[^\S\n]*\n\s*", r"\n\s*", r"[.!?…]['\"”’»)\]]*\s+|[。！？]", r"\s+")


@dataclass(frozen=True)
class Edge:
    """Where a part begins: at a character of a row. `near` is how far it may move; 0 for the beginning of a row."""

    row: int
    at: int = 0
    near: int = 0


@dataclass(frozen=True)
class Ends:
    """The parts of each file.

    Attributes:
        edges: by file, where each part but the first begins.
        points: where the rows of each part lie (`Record.point`).
    """

    edges: Mapping[str, Sequence[Edge]]
    points: Sequence[float]

    def parts(self, record: Record, path: str, row: int) -> Iterator[Record]:
        """The record with its point, or what becomes of it where a part begins within its text.

        Args:
            row: its number in its file, from 0.
        """
        edges = self.edges[path]
        first = sum(e.row < row or (e.row == row and not e.near) for e in edges)
        within = [e for e in edges if e.row == row and e.near]
        if not within:
            yield replace(record, lies=self.points[first])
            return
        text = record.text or ""
        cuts = [0, *(end_near(text, edge.at, edge.near) for edge in within), len(text)]
        for number, (start, stop) in enumerate(pairwise(cuts)):
            if stop > start:
                point = self.points[first + number]
                place = _place(record.place, text, start)
                yield replace(record, place=place, text=text[start:stop], lies=point, whole=record.place)


def _place(place: str, text: str, start: int) -> str:
    """Of a part of a row's text: by its line in plain text, whose rows keep their lines."""
    path, _, line = place.rpartition(":")
    if not start:
        return place
    if format_of(Path(path)) == "txt":
        return f"{path}:{int(line) + text.count(chr(10), 0, start)}"
    return f"{place}, from character {start + 1:,}"


def end_near(text: str, at: int, near: int) -> int:
    """Where something ends near a character of a text: a paragraph, else a line, else a sentence, else a word; else that
    character."""
    low, high = max(at - near, 1), min(at + near, len(text) - 1)
    for pattern in _ENDS:
        ends = [m.end() for m in re.finditer(pattern, text[max(low - near, 0) : high])]
        found = [end for e in ends if low <= (end := e + max(low - near, 0)) <= high]
        if found:
            return min(found, key=lambda end: abs(end - at))
    return at


def is_contiguous(path: str, key: str, data: DataConfig, objective: ObjectiveConfig) -> bool:
    """Whether a source is divided so: as the config says, else where it is plain text that is cut in units, or one file."""
    if data.held_out is not HeldOut.auto:
        return data.held_out is HeldOut.contiguous
    files = [] if objective.learns is not Learns.text or is_saved(Path(path)) else source_files(path, key)
    plain = bool(files) and format_of(files[0]) == "txt"
    return plain and (data.text_unit is not TextUnit.file or len(files) == 1)


def find_ends(
    path: str, key: str, data: DataConfig, objective: ObjectiveConfig, shares: Mapping[str, float],
    beat: Callable[[], None] = lambda: None,
) -> Ends:  # fmt: skip
    """Measure a source.

    Args:
        shares: of each split that is cut, in order; what is left over comes first in each file.

    Raises:
        InputError: nothing is there, or it is no data.
    """
    reading, by_text = Reading(data, objective, key=key), objective.learns is Learns.text
    edges: dict[str, list[Edge]] = {}
    sizes: list[int] = []
    parts, owed = list(shares.values()), [0.0] * len(shares)
    last: str | None = None
    for chunk in read_chunks(path, key, data.text_unit):
        beat()
        if isinstance(chunk, InputError):
            continue
        if last not in (None, chunk.path):
            edges[str(last)], sizes = edges_of(sizes, parts, by_text, owed), []
        last = chunk.path
        for record in as_records(parse_chunk(chunk), reading):
            bad = isinstance(record, InputError)
            sizes.append(0 if bad else len(record.text or "") if by_text else 1)  # type: ignore[union-attr]
    if last is not None:
        edges[last] = edges_of(sizes, parts, by_text, owed)
    upto = np.cumsum(parts)
    held = (upto - np.array(parts) / 2).tolist()
    return Ends(edges, [(float(upto[-1]) + 1) / 2, *held])


def edges_of(sizes: Sequence[int], shares: Sequence[float], by_text: bool, owed: list[float]) -> list[Edge]:
    """Where the parts of one file begin.

    Args:
        sizes: of its rows; 0 for one that is bad.
        by_text: sizes are characters, and a row can be cut.
        owed: by edge, how far beyond where they should lie the edges of the files before have to be made up for: of many
            files too small for a part of their own, some give more. Brought up to date.
    """
    begins = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    total = int(begins[-1])
    least = total * min(*shares, 1 - sum(shares))
    can_cut = by_text and least >= LEAST
    most = least * REPAID if can_cut else total
    edges, ideal = [], 0.0
    for held in range(len(shares)):
        wanted = total * (1 - sum(shares[held:]))
        repaid = min(max(owed[held], -most), most)
        ideal = min(max(wanted + repaid, ideal), total)  # no edge before the one before it
        row = int(np.abs(begins - ideal).argmin())
        if can_cut and abs(int(begins[row]) - ideal) > MOVED * least:
            row = int(np.searchsorted(begins, ideal, side="right")) - 1
            edges.append(Edge(row, int(ideal) - int(begins[row]), max(int(NEAR * least), 1)))
        else:
            edges.append(Edge(row))
        owed[held] += wanted - int(begins[row]) - edges[-1].at
    return edges


def records_in(chunk: Chunk, reading: Reading, ends: Ends | None) -> Iterator[Record | InputError]:
    """The records of a chunk; faults stay where they are."""
    for row, record in enumerate(as_records(parse_chunk(chunk), reading), chunk.first):
        if ends is None or isinstance(record, InputError):
            yield record
        else:
            yield from ends.parts(record, chunk.path, row)
