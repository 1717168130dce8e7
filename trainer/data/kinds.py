"""Raw rows -> records: which kind a file holds, its columns mapped and their types checked.

A record is a conversation (messages), a prompt and its response, or a text, with a label for classification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tritune.trainer.config_choices import Kind
from tritune.trainer.config_data import COLUMNS, ROLES, DataConfig
from tritune.trainer.data.chunks import Row
from tritune.trainer.errors import InputError, some_names
from tritune.trainer.shown import bounded

_NEEDS = {
    Kind.messages: ("messages",),
    Kind.prompt_response: ("prompt", "response"),
    Kind.text: ("text",),
    Kind.text_label: ("text", "label"),
}
KINDS_OF = {
    "pretrain": (Kind.text,),
    "sft": (Kind.messages, Kind.prompt_response),
    "classify": (Kind.text_label,),
    "classify_token": (Kind.text_label,),
}
# A longer row takes gigabytes to tokenize (150 bytes and more for one of its own); a deeper one ends the stack.
ROW_BYTES = 8 << 20
DEPTH = 100
# Names under which common data sets have these columns; a mapping in data.columns comes first.
_ALIASES = {
    "prompt": ("prompt", "instruction", "question"),
    "response": ("response", "output", "completion", "answer"),
    "messages": ("messages", "conversations"),
    "label": ("label", "category"),
}


@dataclass(frozen=True)
class Record:
    """One row, in one of our kinds. Fields that its kind does not have are None."""

    place: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    label: str | None = None
    tools: list[Any] | None = None
    group: str | None = None  # value of the column `data.group`

    def digest(self) -> bytes:
        """SHA-256 of the content, not of the place: equal rows land in the same split wherever they stand."""
        content = [self.messages, self.prompt, self.response, self.text]
        content += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()).digest()

    def point(self, digest: bytes) -> float:
        """Where the row lies in [0, 1) when a source is divided: by its group where there is one, else by its content."""
        if self.group is not None:
            digest = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


class Reading:
    """Rows of one source to records. The kind is settled by the first good row.

    Attributes:
        kind: None until a row was read.
        seen: which of the columns named in `data.columns` and `data.group` some row had.
    """

    def __init__(self, config: DataConfig, objective: str, kind: Kind | None = None) -> None:
        self.config, self.objective, self.kind = config, objective, kind
        self.seen: set[str] = set()
        self._wanted = set(named_columns(config).values())
        self._columns: dict[tuple[str, ...], dict[str, str]] = {}

    def record(self, row: Row) -> Record:
        """Convert one row.

        Raises:
            InputError: a column that is missing, a value of the wrong type, text of more than `ROW_BYTES` bytes, lists within
                lists more than `DEPTH` deep.
        """
        names = tuple(row.fields)
        columns = self._columns.get(names)
        if columns is None:
            columns = self._columns[names] = columns_of(row, self.config)
            self.seen |= self._wanted & row.fields.keys()
        if self.kind is None:
            self.kind = _kind(row, columns, self.config, self.objective)
        record = _record(row, self.kind, columns, self.config)
        _require_length(record)
        return record


def as_records(rows: Iterable[Row | InputError], reading: Reading) -> Iterator[Record | InputError]:
    """Rows to records; faults stay where they are, and rows that are no records become some."""
    for row in rows:
        try:
            yield row if isinstance(row, InputError) else reading.record(row)
        except InputError as error:
            yield error


def named_columns(config: DataConfig) -> dict[str, str]:
    """Config key -> the column of the file that it names."""
    named = {f"data.columns.{ours}": theirs for ours, theirs in config.columns.items()}
    return named | ({"data.group": config.group} if config.group else {})


def columns_of(row: Row, config: DataConfig) -> dict[str, str]:
    """Our name -> the file's, for the columns that this row has."""
    found = {}
    for ours in COLUMNS:
        for theirs in (config.columns[ours],) if ours in config.columns else _ALIASES.get(ours, (ours,)):
            if theirs in row.fields:
                found[ours] = theirs
                break
    return found


def _kind(row: Row, columns: dict[str, str], config: DataConfig, objective: str) -> Kind:
    allowed = KINDS_OF[objective]
    if config.kind is not Kind.auto:
        if config.kind not in allowed:
            names = ", ".join(k.value for k in allowed)
            raise InputError(
                f"data.kind={config.kind.value}", f"objective={objective} reads {names}", "Choose one of these"
            )
        return config.kind
    for kind in allowed:
        if all(name in columns for name in _NEEDS[kind]):
            return kind
    needs = " or ".join(" + ".join(_NEEDS[kind]) for kind in allowed)
    rule = f"objective={objective} needs the columns {needs}, and this file has {some_names(row.fields)}"
    raise InputError(row.place, rule, f"Map them: data.columns.{_NEEDS[allowed[-1]][-1]}=<name in the file>")


def _record(row: Row, kind: Kind, columns: dict[str, str], config: DataConfig) -> Record:
    for name in _NEEDS[kind]:
        if name not in columns:
            wanted = config.columns.get(name, name)
            rule = f"the column {wanted} is missing; this row has {some_names(row.fields)}"
            raise InputError(row.place, rule, f"Map it: data.columns.{name}=<name in the file>")
    group = _string(row, config.group) if config.group and config.group in row.fields else None
    if config.group and not group:
        what = "missing" if group is None else "empty"
        rule = f"the column {config.group} is {what}; this row has {some_names(row.fields)}"
        raise InputError(row.place, rule, "Mend the row, or leave out data.group")
    if kind is Kind.messages:
        tools = tools_of(row, columns["tools"]) if "tools" in columns else None
        return Record(row.place, messages=messages_of(row, columns["messages"]), tools=tools, group=group)
    values = {name: _string(row, columns[name]) for name in _NEEDS[kind]}
    if values.get("label") == "":
        rule = f"the column {columns['label']} is empty, and a label is a word"
        raise InputError(row.place, rule, "Mend the row, or skip such rows with data.bad_rows=skip")
    if kind is Kind.prompt_response and "input" in columns:
        extra = _string(row, columns["input"])
        values["prompt"] += f"\n\n{extra}" if extra else ""
    return Record(row.place, group=group, **values)  # type: ignore[arg-type]


def _string(row: Row, column: str) -> str:
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, str | int):
        rule = f"column {column} is {bounded(_said(value), 60)}, and must be text"
        raise InputError(row.place, rule, "Mend the row")
    return _require_text(str(value), row.place)


def messages_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The turns of a conversation: role and content, and whatever else a template may read (`tool_calls`, `name`)."""
    value: Any = row.fields[column]
    if not isinstance(value, list) or not value:
        raise InputError(
            row.place, f"column {column} is not a list of messages", 'Write [{"role": ..., "content": ...}]'
        )
    messages = []
    for index, message in enumerate(value):
        if isinstance(message, dict):  # Parquet fills the keys that other rows have with None
            message = {k: v for k, v in message.items() if v is not None or k == "content"}
        if not isinstance(message, dict) or message.get("role") not in ROLES or not _has_content(message):
            rule = f"message {index} is {bounded(_said(message), 80)}, without a known role and a text content"
            raise InputError(row.place, rule, f"Roles are {', '.join(ROLES)}; content is a string")
        _require_texts(message, row.place)
        messages.append(message)
    return messages


def _has_content(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def tools_of(row: Row, column: str) -> list[Any] | None:
    """The tools a conversation may call: a list of JSON schemas, or the JSON text of one."""
    value: Any = row.fields[column]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except RecursionError:
            raise _too_deep(row.place) from None
        except ValueError:
            raise InputError(row.place, f"column {column} is not JSON", "Write a list of JSON schemas") from None
    if value is not None and value != "" and not isinstance(value, list):
        raise InputError(row.place, f"column {column} is no list of tools", "Write a list of JSON schemas")
    _require_texts(value, row.place)
    return value or None


def _require_texts(value: Any, place: str, depth: int = 0) -> None:
    """Every text in lists and mappings, which are not too deep."""
    if isinstance(value, str):
        _require_text(value, place)
    elif isinstance(value, list | dict):
        if depth == DEPTH:
            raise _too_deep(place)
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _require_texts(part, place, depth + 1)


def _too_deep(place: str) -> InputError:
    rule = f"its lists and objects stand in one another more than {DEPTH} deep"
    return InputError(place, rule, "Flatten the row, or skip such rows with data.bad_rows=skip")


def _require_length(record: Record) -> None:
    texts = (record.prompt, record.response, record.text)
    size = sum(map(_length, (*texts, *(record.messages or ()), *(record.tools or ()))))
    if size > ROW_BYTES:
        rule = f"the row has {size:,} bytes of text, and {ROW_BYTES:,} are the most"
        raise InputError(record.place, rule, "Cut it into several rows, or skip such rows with data.bad_rows=skip")


def _length(value: Any) -> int:
    """The bytes of all texts in a value, as UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, dict):
        return sum(map(_length, value)) + sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 0


def _said(value: Any) -> str:
    """A value for a message."""
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return "too deep to show"


def _require_text(text: str, place: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes, and NUL, which only damage puts there."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"character {error.start} is half of a surrogate pair, {text[error.start]!r}"
        raise InputError(place, rule, "Write the whole character, or remove it") from None
    if "\0" in text:
        raise InputError(place, f"character {text.index(chr(0))} is NUL", "Remove it: the file is damaged")
    return text
