"""A second reading of the rows, for what tokens do not show: whom they name, what nearly repeats, what is answered twice."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from tritune.trainer.audit.findings import PLACES
from tritune.trainer.audit.sightings import Sightings, hide, look
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.data import AuditConfig, Check, DataConfig, data_of, held_out_sources, training_sources
from tritune.trainer.config.registry import reading_text
from tritune.trainer.data.clean import compared_text, said
from tritune.trainer.data.duplicates import NearDuplicates, exact_key, normalised
from tritune.trainer.data.held_out import find_ends, is_contiguous, records_in
from tritune.trainer.data.kinds import Reading, Record, turns_of
from tritune.trainer.data.records import read_chunks
from tritune.trainer.data.splits import retention_data
from tritune.trainer.errors import InputError

FIRST, SPREAD = 64, 64  # rows for the chat template: the first, and at least half as many as this over all of them


@dataclass(frozen=True)
class Part:
    """A source as the config gives it, and the splits cut from it with their shares."""

    split: str
    path: str
    key: str
    data: DataConfig
    objective: ObjectiveConfig
    shares: dict[str, float] = field(default_factory=dict)

    def split_of(self, point: float) -> str:
        """The split of the row that lies there (`Record.point`), as `tables.Divider` has it."""
        return self._names[bisect_right(self._edges, point)]

    @cached_property
    def _edges(self) -> list[float]:
        return list(np.cumsum(list(self.shares.values())))

    @cached_property
    def _names(self) -> list[str]:
        return [*self.shares, self.split]


def parts_of(data: DataConfig, objective: ObjectiveConfig) -> list[Part]:
    """Every source, those of training first, the retention text last."""
    shares = {n: s for n, s in (("validation", data.validation_share), ("test", data.test_share)) if s}
    parts = [
        Part("train", path, key, data_of(data, key), objective, shares) for path, key in training_sources(data).values()
    ]
    parts += [
        Part(name, path, key, data_of(data, key), objective) for name, (path, key) in held_out_sources(data).items()
    ]
    if data.retention is not None:
        text = retention_data(data)
        parts.append(Part("retention", data.retention, "data.retention", text, reading_text()))
    return parts


def records_of(part: Part) -> Iterator[Record | InputError]:
    """The rows of a source, and in the place of a bad one its fault.

    Raises:
        InputError: nothing is there, or it does not read on.
    """
    reading, ends = Reading(part.data, part.objective, key=part.key), None
    if part.shares and is_contiguous(part.path, part.key, part.data, part.objective):
        ends = find_ends(part.path, part.key, part.data, part.objective, part.shares)
    for chunk in read_chunks(part.path, part.key, part.data.text_unit):
        yield from [chunk] if isinstance(chunk, InputError) else records_in(chunk, reading, ends)


def question_of(record: Record) -> tuple[str, str]:
    """What is given and what is said to it: text and label; prompt and response; the turns before the last answer, and it."""
    if record.text is not None:
        return record.text, record.label or ""
    turns = turns_of(record)
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=len(turns))
    given = "\n".join(f"{t['role']}: {said(t)}" for t in turns[:last])
    return given, said(turns[last]) if last < len(turns) else ""


@dataclass
class Texts:
    """What the second reading keeps of each row, numbered over all sources in the order of `parts_of`.

    Attributes:
        splits: number of the row's split in `names`.
        digests: 16 bytes a row, of the content without its label.
        asked: by split, whether its rows ask and answer; plain text does not. Such rows come last.
        questions, answers: 16 bytes a row that does, keys of `question_of`; the question's of its normalised text.
        near: the texts, where near duplicates are wanted.
        said: of classification, each row's label.
        labels: by split, how many rows each label has; `label_places` has the first places of (split, label).
        seen: what rows show that are looked at alone.
        sample: rows to try the chat template on.
        bad: how many rows of each source (its key) cannot be read; `bad_places` has (place, why) of the first.
        faults: of sources that do not read.
    """

    names: list[str]
    asked: list[bool]
    near: NearDuplicates | None
    places: list[str] = field(default_factory=list)
    splits: array = field(default_factory=lambda: array("b"))
    digests: bytearray = field(default_factory=bytearray)
    questions: bytearray = field(default_factory=bytearray)
    answers: bytearray = field(default_factory=bytearray)
    said: list[str] = field(default_factory=list)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    label_places: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    seen: dict[Check, Sightings] = field(default_factory=dict)
    sample: list[Record] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    bad_places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    faults: list[InputError] = field(default_factory=list)

    def keys(self, which: bytearray) -> np.ndarray:
        """uint64 [rows, 2]."""
        return np.frombuffer(bytes(which), np.uint64).reshape(-1, 2)


def read_texts(
    data: DataConfig, objective: ObjectiveConfig, settings: AuditConfig,
    tell: Callable[[str, int], None] = lambda key, rows: None,
) -> Texts:  # fmt: skip
    """Read every row of every source once more.

    Args:
        tell: of a source that is being read, and how many of its rows were.
    """
    parts = parts_of(data, objective)
    names = list(dict.fromkeys(name for part in parts for name in (part.split, *part.shares)))
    asked = [name != "retention" and objective.learns is not Learns.text for name in names]
    texts = Texts(names, asked, NearDuplicates(data.similarity) if settings.near_duplicates else None)
    sample = _Sample()
    for part in parts:
        number = {name: names.index(name) for name in (part.split, *part.shares)}
        try:
            for row, record in enumerate(records_of(part)):
                if row % 1000 == 0:
                    tell(part.key, row)
                if isinstance(record, InputError):
                    texts.bad[part.key] += 1
                    places = texts.bad_places.setdefault(part.key, [])
                    if len(places) < PLACES:
                        places.append((record.value, hide(record.rule)))
                    continue
                digest = record.digest()
                split = part.split_of(record.point(digest)) if part.shares else part.split
                texts.splits.append(number[split])
                texts.digests += digest[:16]
                _add(texts, record, split, settings.personal)
                if objective.learns is Learns.answers and split != "retention":
                    sample.add(record)
        except InputError as error:
            texts.faults.append(error)
    texts.sample = sample.rows()
    return texts


def _add(texts: Texts, record: Record, split: str, personal: bool) -> None:
    texts.places.append(record.place)
    if texts.asked[texts.splits[-1]]:
        question, answer = question_of(record)
        texts.questions += exact_key(normalised(question))
        texts.answers += exact_key(answer)
    if texts.near is not None:
        texts.near.add(compared_text(record))
    if record.label is not None:
        texts.said.append(sys.intern(record.label))
        texts.labels.setdefault(split, Counter())[record.label] += 1
        places = texts.label_places.setdefault((split, record.label), [])
        if len(places) < PLACES:
            places.append(record.place)
    look(texts.seen, record, personal)


class _Sample:
    """The first rows, and a spread of the others: every n-th, with n doubled whenever they become too many."""

    def __init__(self) -> None:
        self._first: list[Record] = []
        self._spread: list[Record] = []
        self._stride, self._count = 1, 0

    def add(self, record: Record) -> None:
        if len(self._first) < FIRST:
            self._first.append(record)
            return
        if self._count % self._stride == 0:
            self._spread.append(record)
            if len(self._spread) > SPREAD:
                self._spread = self._spread[::2]
                self._stride *= 2
        self._count += 1

    def rows(self) -> list[Record]:
        return self._first + self._spread
