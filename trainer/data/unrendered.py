"""What a conversation holds and its template did not write: contents, thoughts, calls of tools with their arguments, tools.

A template may trim, escape or lay out again what it is given; so a text counts as written where its lines are found, as they
stand or as JSON writes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tritune.trainer.data.rendering import THOUGHTS
from tritune.trainer.data.spans import ASSISTANT, Rendered

DEPTH = 3  # JSON as a text within JSON within JSON
_OPEN, _CLOSE = "<think>", "</think>"
_NO_TEXT = {"type", "id", "index", "$schema", "strict"}  # keys whose values many templates leave out, and may


def unrendered(messages: Sequence[dict], tools: list | None, rows: Sequence[Rendered]) -> dict[str, int]:
    """What is missing from the texts that a conversation became, and how often; almost always nothing.

    Answers that are trained are looked for in what is trained of them; of others their thoughts may be left out.
    """
    missing: Counter[str] = Counter()
    whole = rows[-1]
    trained = {turn: (row.text, a, b) for row in rows for turn, (a, b) in row.turns.items() if a < b}
    for number, message in enumerate(messages[: whole.upto]):
        text, start, stop = trained.get(number, (whole.text, 0, len(whole.text)))
        content = message.get("content")
        if type(content) is str and len(message) == 2 and text.find(content, start, stop) >= 0:
            continue
        for what, value in _parts(message, number in trained):
            if not _written(value, text, start, stop):
                missing[what] += 1
    missing.update(_repeated(messages[: whole.upto], whole.text))
    if tools and not all(_tool_written(tool, whole.text) for tool in tools):
        missing["tools"] += 1
    return dict(missing)


def _parts(message: dict, trained: bool) -> Iterator[tuple[str, Any]]:
    """What of a message is looked for, and what it is called."""
    content, role = message.get("content"), message.get("role")
    said = content if isinstance(content, str) else _texts_of(content)
    if role == ASSISTANT and _CLOSE in said:
        thought, _, said = said.rpartition(_CLOSE)
        if trained:
            yield "thoughts", thought.replace(_OPEN, "\n").replace(_CLOSE, "\n")
    yield f"contents of {role} turns", said
    if trained:
        yield "thoughts", next((message[name] for name in THOUGHTS if message.get(name)), "")
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            yield "tool calls", [function.get("name"), _parsed(function.get("arguments"))]


def _texts_of(content: Any) -> str:
    """The texts of content that comes in parts."""
    if not isinstance(content, list):
        return ""
    return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _repeated(messages: Sequence[dict], text: str) -> Iterator[str]:
    """Kinds of turns with a content that stands in fewer places than there are turns that say it."""
    said = [(c.strip(), m["role"]) for m in messages if isinstance(c := m.get("content"), str) and _CLOSE not in c]
    if len(said) == len({content for content, _ in said}):
        return
    for content, count in Counter(content for content, _ in said).items():
        if count > 1 and content and content in text and text.count(content) < count:
            yield f"contents of {next(role for one, role in said[::-1] if one == content)} turns"


def _tool_written(tool: Any, text: str) -> bool:
    if json.dumps(tool, ensure_ascii=False) in text:
        return True
    return all(_written(part, text, 0, len(text)) for part in _named(tool))


def _named(value: Any) -> Iterator[Any]:
    """Names, descriptions and choices of a tool's schema, and the names of its properties."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key == "properties" and isinstance(part, dict):
                yield from part
                for schema in part.values():
                    yield from _named(schema)
            elif isinstance(part, dict | list):
                yield from _named(part)
            elif key in ("name", "description"):
                yield part
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, str):
                yield part
            else:
                yield from _named(part)


def _written(value: Any, text: str, start: int, stop: int) -> bool:
    """Whether every part of a value is found in `text[start:stop]`."""
    if isinstance(value, str):
        return text.find(value.strip(), start, stop) >= 0 or _in_lines(value, text[start:stop])
    if isinstance(value, dict):
        parts = [*value, *(part for key, part in value.items() if key not in _NO_TEXT)]
        return all(_written(part, text, start, stop) for part in parts)
    if isinstance(value, list):
        return all(_written(part, text, start, stop) for part in value)
    spelled = (str(value), json.dumps(value, default=str))
    return value is None or any(text.find(one, start, stop) >= 0 for one in spelled)


def _in_lines(value: str, text: str) -> bool:
    """Whether a text is there as JSON writes it, also as a part of another text, or line by line."""
    for in_ascii in (False, True):
        written = value
        for _ in range(DEPTH):
            written = json.dumps(written, ensure_ascii=in_ascii)[1:-1]
            if written in text:
                return True
    return all(line.strip() in text for line in value.splitlines())
