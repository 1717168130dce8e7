"""Raw rows -> records: which kind a file holds, its columns mapped and their types checked.

A record is a conversation (messages), a prompt and its response, or a text, with a label for classification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.config.axes import Learns, ObjectiveConfig
from tritune.trainer.config.choices import Kind
from tritune.trainer.config.data import DataConfig, columns_key
from tritune.trainer.config.registry import reading_text
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.columns import (
    NEEDS,
    Layout,
    columns_of,
    how_to_map,
    layout_of,
    missing_of,
    named_columns,
    parts_of,
)
from tritune.trainer.data.forms import conversation, pair, tools_of, value_of
from tritune.trainer.data.learning import require_no_verdict, require_one_answer, require_rows, verdicts_of
from tritune.trainer.data.row_limits import ROW_BYTES, SKIP, text_bytes
from tritune.trainer.data.turns import flag_of
from tritune.trainer.data.unread import Unread
from tritune.trainer.errors import InputError, some_names


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
    lies: float | None = None  # its point, where it does not come from its content
    whole: str | None = None  # the place of the row that this is a part of

    def digest(self) -> bytes:
        """SHA-256 of the content, not of the place: equal rows land in the same split wherever they stand."""
        content = [self.messages, self.prompt, self.response, self.text]
        content += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()).digest()

    def point(self, digest: bytes) -> float:
        """Where the row lies in [0, 1) when a source is divided: as is settled, else by its group, else by its content."""
        if self.lies is not None:
            return self.lies
        if self.group is not None:
            digest = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def turns_of(record: Record) -> list[dict[str, Any]]:
    """The row as a conversation."""
    if record.messages is not None:
        return record.messages
    return [{"role": "user", "content": record.prompt or ""}, {"role": "assistant", "content": record.response or ""}]


class Reading:
    """Rows of one source to records. The kind is settled by the first good row.

    Attributes:
        kind: None until a row was read.
        seen: which of the columns named in `data.columns` and `data.group` some row had.
        unread: what rows hold and nothing reads, counted.

    Args:
        config: of the source (`data_of`).
        key: the config key of the source, for messages.
    """

    def __init__(
        self, config: DataConfig, objective: ObjectiveConfig, kind: Kind | None = None, key: str = "data.train"
    ) -> None:
        self.config, self.objective, self.kind, self.key = config, objective, kind, key
        self.seen: set[str] = set()
        self.unread = Unread()
        self._wanted = set(named_columns(config, key).values())
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def record(self, row: Row) -> Record:
        """Convert one row.

        Raises:
            InputError: a column that is missing, a value of the wrong type, text of more than `ROW_BYTES` bytes, lists within
                lists more than `DEPTH` deep, a row made for another kind of learning, a loss flag that cannot be obeyed.
        """
        layout = self.layout(row)
        require_no_verdict(row, layout.verdicts, self.objective.name)
        for name in layout.flags:
            if flag_of(row.fields[name], name, row.place) is False:
                rule = f"its {name} says that it is not to be learnt"
                raise InputError(row.place, rule, f"Leave it out: data.bad_rows=skip. Or data.ignore=[{name}]")
        record = self._record(row, layout)
        _require_length(record)
        self.unread.add(row.fields, layout.unread)
        return record

    def layout(self, row: Row) -> Layout:
        """How rows with the columns of this one are read."""
        names = tuple(row.fields)
        layout = self._layouts.get(names)
        if layout is None:
            self.seen |= {theirs for theirs in self._wanted if parts_of(theirs, names)}
            columns, chat = columns_of(names, self.config), self.objective.learns is Learns.answers
            if chat:
                require_one_answer(row, self.config, self.prefix, self.objective.name)
            if self.kind is None:
                self.kind = self._settled(row, columns)
            verdicts = verdicts_of(names, self.config) if chat else ()
            layout = self._layouts[names] = layout_of(names, columns, self.kind, self.config, verdicts)
        return layout

    def _settled(self, row: Row, columns: dict[str, str]) -> Kind:
        allowed = self.objective.kinds
        require_rows(row, self.config)
        if self.config.kind is not Kind.auto:
            if self.config.kind not in allowed:
                names = ", ".join(k.value for k in allowed)
                rule = f"objective={self.objective.name} reads {names}"
                raise InputError(f"data.kind={self.config.kind.value}", rule, "Choose one of these")
            return self.config.kind
        for kind in allowed:
            if all(name in columns for name in NEEDS[kind]):
                return kind
        raise self._without(row, columns, allowed)

    def _without(self, row: Row, columns: dict[str, str], kinds: tuple[Kind, ...]) -> InputError:
        """What is said of a row that lacks a column of each kind."""
        missing = missing_of(kinds, columns)
        needs = " or ".join(" + ".join(NEEDS[kind]) for kind in kinds)
        rule = f"objective={self.objective.name} needs the columns {needs}; {' and '.join(missing)} is missing"
        rule += f", and this file has {some_names(row.fields)}"
        remedy = how_to_map(missing, row.fields, columns, self.prefix)
        if self.objective.learns is Learns.answers and "text" in columns:
            remedy = f"objective={reading_text().name} reads its text. To learn answers, write prompt and response"
        for name, value in row.fields.items():
            inner = value[0] if isinstance(value, list) and value else value
            if isinstance(inner, dict) and not missing_of(kinds, columns_of(inner.keys(), self.config)):
                rule += f"; its {name} holds {'rows' if inner is not value else 'a row'}"
                path = Path(row.place.rpartition(":")[0])
                remedy = (
                    f"Give that alone: jq -c '.{name}{'[]' * (inner is not value)}' {path} > {path.stem}_{name}.jsonl"
                )
        return InputError(row.place, rule, remedy)

    @property
    def prefix(self) -> str:
        """The config key of the mapping that this source has."""
        return columns_key(self.config, self.key)

    def _record(self, row: Row, layout: Layout) -> Record:
        assert self.kind is not None
        columns, config = layout.columns, self.config
        for name in NEEDS[self.kind]:
            if name not in columns:
                rule = f"the column {config.columns.get(name, name)} is missing; this row has {some_names(row.fields)}"
                hint = "Mend the row"  # the kind was read off an earlier one, which has it
                if config.kind is not Kind.auto:
                    hint = how_to_map([name], row.fields, columns, self.prefix)
                raise InputError(row.place, rule, f"{hint}. Or {SKIP}")
        group = _group(row, config)
        if self.kind in (Kind.text, Kind.text_label):
            values = {name: value_of(row, columns[name], truths=name == "label") for name in NEEDS[self.kind]}
            if values.get("label") == "":
                rule = f"the column {columns['label']} is empty, and a label is a word"
                raise InputError(row.place, rule, f"Mend the row, or {SKIP}")
            return Record(row.place, group=group, **values)  # type: ignore[arg-type]
        tools = tools_of(row, columns["tools"]) if "tools" in columns else None
        if self.kind is Kind.messages:
            return Record(row.place, messages=conversation(row, columns, config), tools=tools, group=group)
        said = pair(row, columns, config)
        if isinstance(said, tuple):
            return Record(row.place, prompt=said[0], response=said[1], tools=tools, group=group)
        return Record(row.place, messages=said, tools=tools, group=group)


def _group(row: Row, config: DataConfig) -> str | None:
    if not config.group:
        return None
    group = value_of(row, config.group) if config.group in row.fields else None
    if not group:
        what = "missing" if group is None else "empty"
        rule = f"the column {config.group} is {what}; this row has {some_names(row.fields)}"
        raise InputError(row.place, rule, f"Mend the row, leave out data.group, or {SKIP}")
    return group


def as_records(rows: Iterable[Row | InputError], reading: Reading) -> Iterator[Record | InputError]:
    """Rows to records; faults stay where they are, and rows that are no records become some."""
    for row in rows:
        try:
            yield row if isinstance(row, InputError) else reading.record(row)
        except InputError as error:
            yield error


def _require_length(record: Record) -> None:
    texts = (record.prompt, record.response, record.text)
    size = sum(map(text_bytes, (*texts, *(record.messages or ()), *(record.tools or ()))))
    if size > ROW_BYTES:
        rule = f"the row has {size:,} bytes of text, and {ROW_BYTES:,} are the most"
        raise InputError(record.place, rule, f"Cut it into several rows, or {SKIP}")
