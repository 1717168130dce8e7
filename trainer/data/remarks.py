"""What is said of rows that are trained on all the same: counted by kind for each split, with the first places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tritune.trainer.config.choices import Unrendered
from tritune.trainer.config.data import DataConfig
from tritune.trainer.errors import InputError

PLACES = 20  # named of each kind
PARTS = 200  # told apart of each kind


class Kind(StrEnum):
    """What there is to say."""

    apart = "apart"  # answers of one conversation in rows of their own
    unrendered = "unrendered"  # the template does not write all that the row holds
    control = "control"  # its texts hold control tokens
    unknown = "unknown"  # characters that become `<unk>`
    unknown_answers = "unknown_answers"  # such in what is trained of an answer
    by_bytes = "by_bytes"  # characters that are spelt byte by byte
    truncated_answers = "truncated_answers"  # a cut took trained tokens of it
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


def require_rendered(said: Said, rows: int, data: DataConfig) -> None:
    """Refuse rows of which the template leaves something out.

    Raises:
        InputError: it says what, how often, and names the first such row.
    """
    tally = said.get(Kind.unrendered)
    if tally is not None and data.unrendered is Unrendered.refuse:
        rule = f"the chat template leaves out what {tally['rows']:,} of {rows:,} rows hold: {named(tally['parts'])}"
        remedy = "Give a model.chat_template=<file> that writes it, take it out of the rows, or train without: "
        raise InputError(tally["places"][0], rule, remedy + "data.unrendered=warn")


def named(parts: Mapping[str, int], most: int = PARTS) -> str:
    """What there is, and how often, the most frequent first."""
    first = sorted(parts.items(), key=lambda p: (-p[1], p[0]))
    more = f" and {len(first) - most:,} more" if len(first) > most else ""
    return ", ".join(f"{name} ({count:,})" for name, count in first[:most]) + more


def _merge(said: Said, kind: str, tally: Mapping[str, Any]) -> None:
    mine = said.setdefault(str(kind), {"rows": 0, "places": [], "parts": {}})
    mine["rows"] += tally["rows"]
    mine["places"] += tally["places"][: PLACES - len(mine["places"])]
    for name, count in tally["parts"].items():
        name = name if name in mine["parts"] or len(mine["parts"]) < PARTS else "others"
        mine["parts"][name] = mine["parts"].get(name, 0) + count
