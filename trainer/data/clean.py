"""Rows that nearly repeat an earlier one of their source."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tritune.trainer.data.duplicates import NearDuplicates
from tritune.trainer.data.kinds import Reading, Record, as_records, turns_of
from tritune.trainer.data.pipeline import Source
from tritune.trainer.data.records import read_all


def compared_text(record: Record) -> str:
    """What is compared with other rows: text, prompt and response, or all turns but the system's, which whole data sets
    share."""
    if record.text is not None:
        return record.text
    return "\n".join(said(t) for t in turns_of(record) if t["role"] != "system")


def said(turn: dict[str, Any]) -> str:
    """The words of a turn, and what it calls."""
    words = str(turn.get("content") or "")
    calls = turn.get("tool_calls")
    return f"{words}\n{json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)}" if calls else words


def near_groups(source: Source, similarity: float, beat: Callable[[], None]) -> dict[str, int]:
    """Place -> number of its group, for rows with the same label whose texts are linked by pairs that are as similar as that.

    A reading of its own, in this process: rows are compared by their text, of which only hashes are kept.
    """
    reading = Reading(source.data, source.objective, source.kind, source.key)
    places: dict[str | None, list[str]] = {}
    texts: dict[str | None, NearDuplicates] = {}
    for record in as_records(read_all(source.path, source.key, source.data.text_unit), reading):
        if isinstance(record, Record):  # bad rows are counted when the others are encoded
            texts.setdefault(record.label, NearDuplicates(similarity)).add(compared_text(record))
            places.setdefault(record.label, []).append(record.place)
            if len(places[record.label]) % 1000 == 0:
                beat()
    found = [[places[label][i] for i in group] for label, near in texts.items() for group in near.groups()]
    return {place: number for number, group in enumerate(found) for place in group}
