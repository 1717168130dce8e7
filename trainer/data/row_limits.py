"""What no row may hold: text that no tokenizer takes, and more of it, or deeper, than can be worked on."""

from __future__ import annotations

import json
from typing import Any

from tritune.trainer.errors import InputError

# A longer row takes gigabytes to tokenize (150 bytes and more for one of its own); a deeper one ends the stack.
ROW_BYTES = 8 << 20
DEPTH = 100
SKIP = "skip such rows with data.bad_rows=skip"


def require_text(text: str, place: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes, and NUL, which only damage puts there."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"character {error.start} is half of a surrogate pair, {text[error.start]!r}"
        raise InputError(place, rule, f"Write the whole character, or {SKIP}") from None
    if "\0" in text:
        raise InputError(place, f"character {text.index(chr(0))} is NUL", f"Remove it: the file is damaged. Or {SKIP}")
    return text


def require_texts(value: Any, place: str, depth: int = 0) -> None:
    """Every text in lists and mappings, which are not too deep."""
    if isinstance(value, str):
        require_text(value, place)
    elif isinstance(value, list | dict):
        if depth == DEPTH:
            raise too_deep(place)
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            require_texts(part, place, depth + 1)


def too_deep(place: str) -> InputError:
    rule = f"its lists and objects stand in one another more than {DEPTH} deep"
    return InputError(place, rule, f"Flatten the row, or {SKIP}")


def text_bytes(value: Any) -> int:
    """The bytes of all texts in a value, as UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, dict):
        return sum(map(text_bytes, value)) + sum(map(text_bytes, value.values()))
    return sum(map(text_bytes, value)) if isinstance(value, list) else 0


def said(value: Any) -> str:
    """A value for a message."""
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return "too deep to show"
