"""Rows that nearly repeat an earlier one of their source."""

from __future__ import annotations

from tritune.trainer.data.chunks import parse_chunk
from tritune.trainer.data.duplicates import NearDuplicates
from tritune.trainer.data.kinds import Reading, Record
from tritune.trainer.data.pipeline import Source
from tritune.trainer.data.records import read_chunks
from tritune.trainer.errors import InputError


def compared_text(record: Record) -> str:
    """What is compared with other rows: text, prompt and response, or all turns but the system's, which whole data sets
    share."""
    if record.text is not None:
        return record.text
    if record.messages is None:
        return f"{record.prompt or ''}\n{record.response or ''}"
    return "\n".join(t.get("content") or "" for t in record.messages if t["role"] != "system")


def near_repeats(source: Source, similarity: float) -> frozenset[str]:
    """Places of the rows that are as similar as that to an earlier row, or to one that is to an earlier one.

    A reading of its own, in this process: rows are compared by their text, of which only hashes are kept.
    """
    reading, places, found = Reading(source.data, source.objective, source.kind), [], NearDuplicates(similarity)
    for chunk in read_chunks(source.path, source.key, source.data.text_unit):
        for row in [] if isinstance(chunk, InputError) else parse_chunk(chunk):
            if isinstance(row, InputError):
                continue
            try:
                record = reading.record(row)
            except InputError:  # counted when the rows are encoded
                continue
            found.add(compared_text(record))
            places.append(record.place)
    return frozenset(places[i] for group in found.groups() for i in group[1:])
