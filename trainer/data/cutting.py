"""Rows above `data.max_length` that lose tokens of what is asked, so that what is answered stays whole.

What may go is the content of turns that are not trained: never a token that is trained, nor what a template writes around a
content. What goes is one run of tokens from within one content to within another of the same role: whole turns between them go,
and what is left reads as if the template had written it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
from tokenizers import Encoding
from tritune.trainer.data.spans import Rendered

Run = tuple[int, int]  # tokens [start, stop)
SYSTEM = "system"


@dataclass(frozen=True)
class Content:
    """The tokens [start, stop) of a text that is not trained: a prompt, or the content of one turn.

    Attributes:
        inner: those that go on with a character that the token before began, as bytes do; no cut falls before one.
    """

    start: int
    stop: int
    role: str = "user"
    inner: frozenset[int] = frozenset()


def runs_to_cut(asked: Sequence[Sequence[Content]], excess: int, middle: bool) -> list[Run] | None:
    """Which tokens go so that `excess` do, or a few more where whole turns or characters do; None where contents have too few.

    Args:
        asked: contents in the order of their tokens, those before the first answer, before the second, and so on. Later ones
            are touched when all of the earlier ones are gone, and system turns last of all.
        middle: keep the beginning of what is asked as well as its end; else its end alone.
    """
    parts = [list(part) for contents in asked for _, part in groupby(contents, lambda c: c.role == SYSTEM)]
    groups = sorted(parts, key=lambda part: part[0].role == SYSTEM)  # no run reaches over a system turn
    runs: list[Run] = []
    for contents in groups:
        left = excess - _size(runs)
        if left <= 0:
            break
        run = _from_middle(contents, left) if middle else None
        found = [run] if run is not None else _from_start(contents, left)
        inner = frozenset().union(*(c.inner for c in contents))
        runs += [_of_whole_characters(run, inner) for run in found]
    return sorted(runs) if _size(runs) >= excess else None


def _of_whole_characters(run: Run, inner: frozenset[int]) -> Run:
    """The run, wider where an end of it lies within a character. A content begins and ends with a whole one."""
    start, stop = run
    while start in inner:
        start -= 1
    while stop in inner:
        stop += 1
    return start, stop


def _size(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def _from_start(contents: Sequence[Content], excess: int) -> list[Run]:
    """The oldest tokens; all that there are where these do not suffice."""
    runs: list[Run] = []
    while contents and excess > 0:
        first = contents[0]
        alike = [c for c in contents if c.role == first.role]
        last = next((c for c in alike if c.stop - first.start >= excess), alike[-1])
        stop = min(max(first.start + excess, last.start), last.stop)
        runs.append((first.start, stop))
        excess -= stop - first.start
        contents = [c for c in contents if c.start >= last.stop]
    return runs


def _from_middle(contents: Sequence[Content], excess: int) -> Run | None:
    """The shortest run of at least `excess` tokens that leaves as much before it as after; None where there is none."""
    found: list[tuple[int, int, Run]] = []
    for a, b in product(contents, contents):
        if a.start > b.start or a.role != b.role or b.stop - a.start < excess:
            continue
        size = excess if a is b else max(excess, b.start - a.stop)
        ideal = contents[0].start + (contents[-1].stop - contents[0].start - size + 1) // 2
        low, high = (a.start, b.stop - size) if a is b else (max(a.start, b.start - size), min(a.stop, b.stop - size))
        start = min(max(ideal, low), high)
        found.append((size, abs(start - ideal), (start, start + size)))
    return min(found)[2] if found else None


def without(ids: Sequence[int], spans: Sequence[Run], runs: Sequence[Run]) -> tuple[list[int], list[Run]]:
    """A row without some runs of its tokens, and where its spans lie then; none of the runs reaches into a span."""
    kept: list[int] = []
    at = 0
    for start, stop in runs:
        kept += ids[at:start]
        at = stop
    before = [_size([run for run in runs if run[1] <= a]) for a, _ in spans]
    return [*kept, *ids[at:]], [(a - gone, b - gone) for (a, b), gone in zip(spans, before, strict=True)]


def content_within(encoding: Encoding, start: int, stop: int, role: str = "user") -> Content:
    """The tokens that lie in the characters [start, stop) whole; an empty content where there is none."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0]))
    if not len(inside):
        return Content(0, 0, role)
    same = offsets[inside[1:], 0] < offsets[inside[:-1], 1]
    return Content(int(inside[0]), int(inside[-1]) + 1, role, frozenset(inside[1:][same].tolist()))


def tokens_until(encoding: Encoding, end: int) -> int:
    """How many tokens there are before those that only follow the characters up to `end`: a tail, or what the tokenizer closes
    a text with, which stands for no character."""
    tokens = list(zip(encoding.offsets, encoding.special_tokens_mask, strict=True))
    while tokens and (tokens[-1][0][1] > end or (tokens[-1][1] and tokens[-1][0][0] == tokens[-1][0][1])):
        tokens.pop()
    return len(tokens)


def asked_contents(row: Rendered, messages: Sequence[dict], frame: str, encoding: Encoding) -> list[list[Content]]:
    """The contents of a rendered row that are not trained, before each of its answers.

    They are looked for in the text from the answer back: tools and system turns stand before what is asked. One that is not
    written word for word, or whose words the template writes itself, is not cut.

    Args:
        frame: what the template writes of its own.
        encoding: of the row's text.
    """
    asked: list[list[Content]] = []
    first, floor = 0, 0
    for turn, (start, stop) in sorted(row.turns.items()):
        found, at = [], start
        for message in reversed(messages[first:turn]):
            content = message.get("content")
            words = content.strip() if isinstance(content, str) else ""
            if not words or words in frame:
                continue
            place = row.text.rfind(words, floor, at)
            if place >= 0:
                at = place
            elif message["role"] == SYSTEM:  # some templates write it into the last question
                place = row.text.find(words, floor, start)
            if place >= 0:
                found.append(content_within(encoding, place, place + len(words), message["role"]))
        asked.append(sorted((c for c in found if c.start < c.stop), key=lambda c: c.start))
        first, floor = turn + 1, max(stop, floor)
    return asked
