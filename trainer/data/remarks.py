"""What is said of rows that are trained on all the same: counted by kind for each split, with the first places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

PLACES = 20  # named of each kind


class Kind(StrEnum):
    """What there is to say."""

    apart = "apart"  # answers of one conversation in rows of their own
    empty = "empty"  # an answer that trains nothing but what closes it


@dataclass(frozen=True)
class Remark:
    """Of one row.

    Attributes:
        row: its number among those it was encoded with.
        parts: what there is of it, and how much.
    """

    row: int
    kind: Kind
    parts: Mapping[str, int] = field(default_factory=dict)


Said = dict[str, dict[str, Any]]  # by kind: rows, their first places, and parts


def add(said: Said, kind: str, place: str, parts: Mapping[str, int]) -> None:
    """Count one row."""
    _merge(said, kind, {"rows": 1, "places": [place], "parts": dict(parts)})


def joined(one: Said, other: Said) -> Said:
    """The sum of two."""
    said: Said = {}
    for part in (one, other):
        for kind, tally in part.items():
            _merge(said, kind, tally)
    return said


def _merge(said: Said, kind: str, tally: Mapping[str, Any]) -> None:
    mine = said.setdefault(str(kind), {"rows": 0, "places": [], "parts": {}})
    mine["rows"] += tally["rows"]
    mine["places"] += tally["places"][: PLACES - len(mine["places"])]
    for name, count in tally["parts"].items():
        mine["parts"][name] = mine["parts"].get(name, 0) + count
