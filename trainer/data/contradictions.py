"""Rows that give the same input different labels or answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tritune.trainer.data.duplicates import exact_key, normalised


@dataclass(frozen=True)
class Contradiction:
    """Row numbers of one input by what they answer: [[0, 7], [3]] is one answer of rows 0 and 7, and another of row 3.

    Each ascending, and in the order of their first rows.
    """

    rows: list[list[int]]


def contradictory(rows: Iterable[tuple[str | bytes, str]]) -> list[Contradiction]:
    """Inputs with more than one label or answer, in the order of their first rows.

    Keeps 32 bytes a row and no text: the caller has the rows, and looks up what they say.

    Args:
        rows: input and label. Inputs that are text are compared after `normalised`, bytes and labels as they stand.
    """
    digests = bytearray()
    for given, label in rows:
        digests += exact_key(normalised(given) if isinstance(given, str) else given) + exact_key(label)
    keys = np.frombuffer(digests, np.uint64).reshape(-1, 4)  # input's two words, label's two words
    order = np.lexsort(keys.T[::-1])  # stable: rows of one input and one label stay ascending
    new_input = np.r_[True, (keys[order[1:], :2] != keys[order[:-1], :2]).any(axis=1)][: len(order)]
    new_label = np.r_[True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1)][: len(order)]
    ends = np.r_[np.flatnonzero(new_input), len(order)]
    labels = np.add.reduceat(new_label, ends[:-1], dtype=np.int64) if len(order) else np.zeros(0, np.int64)
    found = []
    for at in np.flatnonzero(labels > 1):
        some = slice(ends[at], ends[at + 1])
        parts = np.split(order[some], np.flatnonzero(new_label[some])[1:])
        found.append(Contradiction(sorted(part.tolist() for part in parts)))
    return sorted(found, key=lambda c: c.rows)
