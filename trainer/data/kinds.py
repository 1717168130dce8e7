"""Raw rows -> records: which kind a file holds, its columns mapped and their types checked.

A record is one of three shapes: `Conversation` (messages), `Completion` (prompt and response without a template) and
`Text` (with a label for classification).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tritune.trainer.config import COLUMNS, DataConfig
from tritune.trainer.config_choices import Kind
from tritune.trainer.data.records import Row, read_rows
from tritune.trainer.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
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
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    label: str | None = None

    def digest(self) -> bytes:
        """SHA-256 of the content, not of the place: equal rows land in the same split wherever they stand."""
        content = [self.messages, self.prompt, self.response, self.text]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).digest()


def read_records(source: str, key: str, config: DataConfig, objective: str) -> Iterator[Record]:
    """Yield the records of a source.

    Raises:
        InputError: a file that does not read, a column that is missing, a value of the wrong type.
    """
    kind: Kind | None = None
    unseen = set(config.columns.values())
    for row in read_rows(source, key, config.text_unit):
        unseen -= row.fields.keys()
        columns = columns_of(row, config)
        kind = kind or _kind(row, columns, config, objective)
        yield _record(row, kind, columns, config)
    if unseen and kind is not None:
        ours, theirs = next((o, t) for o, t in config.columns.items() if t in unseen)
        rule = f"no row of {source} has the column {theirs}"
        raise InputError(f"data.columns.{ours}={theirs}", rule, f"The last row has {', '.join(row.fields)}")


def split_by_content(
    records: Iterable[Record], shares: dict[str, float]
) -> tuple[list[Record], dict[str, list[Record]]]:
    """Divide records by the hash of their content: the same row lands in the same split, whatever the run's seed, the
    order of the file or what was added to it.

    Args:
        shares: split name -> share of the rows; what is left over stays in the first list.
    """
    rest: list[Record] = []
    parts: dict[str, list[Record]] = {name: [] for name in shares}
    for record in records:
        point = int.from_bytes(record.digest()[:8], "big") / 2**64
        for name, share in shares.items():
            if point < share:
                parts[name].append(record)
                break
            point -= share
        else:
            rest.append(record)
    return rest, parts


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
    rule = f"objective={objective} needs the columns {needs}, and this file has {', '.join(row.fields)}"
    raise InputError(row.place, rule, f"Map them: data.columns.{_NEEDS[allowed[-1]][-1]}=<name in the file>")


def _record(row: Row, kind: Kind, columns: dict[str, str], config: DataConfig) -> Record:
    for name in _NEEDS[kind]:
        if name not in columns:
            wanted = config.columns.get(name, name)
            rule = f"the column {wanted} is missing; this row has {', '.join(row.fields)}"
            raise InputError(row.place, rule, f"Map it: data.columns.{name}=<name in the file>")
    if kind is Kind.messages:
        return Record(row.place, messages=messages_of(row, columns["messages"]))
    values = {name: _string(row, columns[name]) for name in _NEEDS[kind]}
    if kind is Kind.prompt_response and "input" in columns:
        extra = _string(row, columns["input"])
        values["prompt"] += f"\n\n{extra}" if extra else ""
    return Record(row.place, None, **values)


def _string(row: Row, column: str) -> str:
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, str | int):
        rule = f"column {column} is {json.dumps(value, default=str)[:60]}, and must be text"
        raise InputError(row.place, rule, "Mend the row")
    return _require_unicode(str(value), row.place)


def messages_of(row: Row, column: str) -> list[dict[str, str]]:
    value: Any = row.fields[column]
    if not isinstance(value, list) or not value:
        raise InputError(
            row.place, f"column {column} is not a list of messages", 'Write [{"role": ..., "content": ...}]'
        )
    messages = []
    for index, message in enumerate(value):
        ok = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
        if not ok:
            rule = (
                f"message {index} is {json.dumps(message, default=str)[:80]}, without a known role and a text content"
            )
            raise InputError(row.place, rule, f"Roles are {', '.join(ROLES)}; content is a string")
        messages.append({"role": message["role"], "content": _require_unicode(message["content"], row.place)})
    return messages


def _require_unicode(text: str, place: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"character {error.start} is half of a surrogate pair, {text[error.start]!r}"
        raise InputError(place, rule, "Write the whole character, or remove it") from None
    return text
