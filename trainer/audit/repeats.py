"""Rows that stand twice with the same content: in one split, in train and in what it is scored on, with another label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tritune.trainer.audit.findings import PLACES, Finding, Severity, beside, counted
from tritune.trainer.config.data import Check
from tritune.trainer.data.examples import Examples

LEAKED = 0.05  # of a split: no honest one has so much of its training rows


@dataclass(frozen=True)
class Contents:
    """What the rows of one split hold.

    Attributes:
        digests: uint64 [n, 2], of the content without its label; zeros where it is not known.
        labels: int64 [n], -1 where there is none.
    """

    digests: np.ndarray
    labels: np.ndarray
    place: Callable[[int], str]


@dataclass(frozen=True)
class _Shared:
    """The rows whose content another row has, of all splits: its number, label and split of each, all int64 [n].

    `names` and `totals` are of the splits, all their rows counted; `place` is of one of these rows.
    """

    group: np.ndarray
    label: np.ndarray
    split: np.ndarray
    names: list[str]
    totals: list[int]
    place: Callable[[int], str]


def contents_of(examples: Examples) -> Contents:
    """Of tokenized rows, as their table has it."""
    chunks = examples.table["digest"].chunks
    # Bytes of fixed width have no nulls here: each chunk's buffer is its values.
    raw = [np.frombuffer(c.buffers()[1], np.uint64).reshape(-1, 2)[c.offset : c.offset + len(c)] for c in chunks]
    return Contents(np.concatenate([np.zeros((0, 2), np.uint64), *raw]), examples.labels, examples.place)


def repeats(splits: dict[str, Contents]) -> list[Finding]:
    """Exact duplicates within each split, rows of other splits that stand in train, and contents with several labels."""
    if not splits:
        return []
    digests = np.concatenate([c.digests for c in splits.values()])
    labels = np.concatenate([c.labels for c in splits.values()])
    split = np.repeat(np.arange(len(splits)), [len(c.digests) for c in splits.values()])
    known = np.flatnonzero((digests[:, 0] != 0) | (digests[:, 1] != 0))
    totals = np.bincount(split[known], minlength=len(splits)).tolist()
    group = _groups(digests[known])
    shared = (np.bincount(group) > 1)[group] if len(group) else np.zeros(0, bool)
    rows = known[shared]  # few: all that follows is about them
    if not len(rows):
        return []
    group, label, split = group[shared], labels[rows], split[rows]
    names, starts = list(splits), np.cumsum([0, *(len(c.digests) for c in splits.values())])

    def place(row: int) -> str:
        """Of a row by its number among those that share their content."""
        number = int(rows[row])
        which = int(np.searchsorted(starts, number, side="right")) - 1
        return splits[names[which]].place(number - int(starts[which]))

    several = _Shared(group, label, split, names, totals, place)
    leaks = _leaks(several) if names[0] == "train" else []
    return [*_duplicates(several), *leaks, *_contradictions(several)]


def _groups(digests: np.ndarray) -> np.ndarray:
    """Numbers rows by their content, int64 [n]."""
    order = np.argsort(digests[:, 0])
    ordered = digests[order]
    same = ordered[1:] == ordered[:-1]
    if (same[:, 0] & ~same[:, 1]).any():  # 2^-64 a pair; this takes three times as long
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(np.r_[False, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(order)])
    return group


def _first(keys: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """For each key up to `size` the first of `rows` that has it, or -1."""
    first = np.full(size, -1, np.int64)
    first[keys[::-1]] = rows[::-1]  # of several the last assignment stays
    return first


def _duplicates(shared: _Shared) -> Iterator[Finding]:
    for number, name in enumerate(shared.names):
        rows = np.flatnonzero(shared.split == number)
        key = shared.group[rows] * (int(shared.label.max()) + 2) + shared.label[rows] + 1
        unique, inverse = np.unique(key, return_inverse=True)
        first = _first(inverse, rows, len(unique))[inverse]
        again = rows != first
        count = int(again.sum())
        if count:
            total = shared.totals[number]
            pairs = list(zip(rows[again][:PLACES].tolist(), first[again][:PLACES].tolist(), strict=True))
            text = f"{name}: {count:,} of {counted(total, 'row')} the same as an earlier one"
            yield Finding(
                Check.duplicates_exact, Severity.warning, count, text, [shared.place(a) for a, _ in pairs],
                [f"as {beside(shared.place(a), shared.place(b))}" for a, b in pairs], {"split": name, "rows": total},
            )  # fmt: skip


def _leaks(shared: _Shared) -> Iterator[Finding]:
    trained = np.flatnonzero(shared.split == 0)
    first = _first(shared.group[trained], trained, int(shared.group.max()) + 1)
    several = _with_several_labels(shared)
    for number, name in list(enumerate(shared.names))[1:]:
        rows = np.flatnonzero(shared.split == number)
        leaked = rows[first[shared.group[rows]] >= 0]
        relabelled = int(several[shared.group[leaked]].sum())
        if not len(leaked):
            continue
        share = len(leaked) / shared.totals[number]
        text = f"{name}: {len(leaked):,} of {counted(shared.totals[number], 'row')} in train as well"
        places = [shared.place(r) for r in leaked[:PLACES].tolist()]
        others = [shared.place(r) for r in first[shared.group[leaked[:PLACES]]].tolist()]
        notes = [f"as {beside(a, b)}" for a, b in zip(places, others, strict=True)]
        details = {"split": name, "rows": shared.totals[number], "share": share, "relabelled": relabelled}
        yield Finding(Check.leakage_exact, Severity.warning, len(leaked), text, places, notes, details)
        if share >= LEAKED and name != "retention":
            text = f"{share:.0%} of {name} stands in train: its scores would say nothing"
            yield Finding(Check.split_leaked, Severity.fault, len(leaked), text, places[:1], notes[:1], details)


def _with_several_labels(shared: _Shared) -> np.ndarray:
    """Whether the rows of a group have several, bool [groups]."""
    rows = np.flatnonzero(shared.label >= 0)
    pairs = np.unique(np.stack([shared.group[rows], shared.label[rows]], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=int(shared.group.max()) + 1) > 1


def _contradictions(shared: _Shared) -> Iterator[Finding]:
    rows = np.flatnonzero(shared.label >= 0)
    if not len(rows):
        return
    several = _with_several_labels(shared)
    count = int(several.sum())
    if count:
        which = rows[several[shared.group[rows]]]
        which = which[np.argsort(shared.group[which], kind="stable")][:PLACES]
        text = f"{counted(count, 'text')} with several labels ({int(several[shared.group[rows]].sum()):,} rows)"
        yield Finding(Check.contradictions, Severity.warning, count, text, [shared.place(r) for r in which.tolist()])
