"""What is said to a reader: without secrets, with control characters spelled out, and no longer than is read.

A value, a column's name or a path may hold what a terminal obeys: colours, a moved cursor, text that runs from right to left.
"""

from __future__ import annotations

import re

from tritune.trainer.redact import redact

LIMIT = 300  # characters of a value in a message
TAIL = 500  # characters kept of a whole message's end, where its rule and remedy stand
_NOTE = 40  # the longest note of what was left out: a text that was cut is not cut again
# C0 and C1 but tab and line break, marks of direction, line separators, and surrogates, which no stream takes.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """`text` as it may be written to a terminal or a log: secrets are `***`, control characters are escapes (`\\x1b`)."""
    return escaped(redact(text))


def escaped(text: str) -> str:
    """`text` with its control characters spelled out; line breaks and tabs stay."""
    return _CONTROLS.sub(lambda m: m[0].encode("unicode_escape", "surrogatepass").decode(), text)


def bounded(text: str, head: int = LIMIT, tail: int = 0) -> str:
    """`text`, or its first `head` and last `tail` characters and how many are left out between them.

    What is cut is redacted before: half of a secret is not known for one.
    """
    if len(text) <= head + tail + _NOTE:
        return text
    text = redact(text)
    left = len(text) - head - tail
    if left <= _NOTE:
        return text
    return f"{text[:head]}... ({left:,} characters left out){text[len(text) - tail :]}"
