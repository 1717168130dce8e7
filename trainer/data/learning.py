"""Rows that are no examples to learn from: pairs of answers, answers labelled good or bad, and whole tables by columns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tritune.trainer.config.data import DataConfig
from tritune.trainer.config.registry import reading_text
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.columns import ALIASES, parts_of
from tritune.trainer.errors import InputError, some_names

# Columns that stand together in rows of several answers, of which one is better.
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("rejected_response",), ("rejected_messages",),
    ("response_0", "response_1"), ("response_a", "response_b"), ("response_j", "response_k"), ("answer_0", "answer_1"),
)  # fmt: skip
# Columns that say whether the answer of a row is a good one.
VERDICTS = ("label", "kto_tag")
_SAID = (True, False, 0, 1, "true", "false", "True", "False", "0", "1")


def require_one_answer(row: Row, config: DataConfig, prefix: str, objective: str) -> None:
    """Refuse rows of two answers of which one is better, unless the config names which of their columns is read.

    Args:
        prefix: the config key of the mapping, for the remedy.
        objective: the name of what learns, for the message.

    Raises:
        InputError: it names the columns.
    """
    settled = _settled(row.fields.keys(), config)
    for names in PAIRS:
        if all(name in row.fields for name in names) and settled.isdisjoint(names):
            rule = (
                f"it has {' and '.join(names)}: a row of preferences, and objective={objective} learns from one answer "
            )
            rule += "each"
            raise InputError(row.place, rule, _one_of(row.fields, names, prefix))


def require_rows(row: Row, config: DataConfig) -> None:
    """Refuse a table that was written by its columns: one object with a list, or numbered values, for each.

    Columns that are mapped or ignored are no sign of one: somebody has looked at them.

    Raises:
        InputError: it says how to write rows.
    """
    settled = _settled(row.fields.keys(), config)
    values = [value for name, value in row.fields.items() if name not in settled]
    lengths = {len(v) if isinstance(v, list | dict) else 0 for v in values}
    if len(values) > 1 and len(lengths) == 1 and max(lengths) > 1 and all(map(_is_column, values)):
        rule = f"it is a table of {max(lengths):,} rows written by columns, {some_names(row.fields)}"
        raise InputError(row.place, rule, 'Write rows: pandas does by df.to_json(path, orient="records", lines=True)')


def _is_column(value: Any) -> bool:
    """Whether it is the values of a column: texts or numbers, in a list or numbered from 0 as pandas does."""
    if isinstance(value, dict):
        return list(value) == [str(i) for i in range(len(value))]
    return isinstance(value, list) and all(isinstance(part, str | int | float) for part in value)


def verdicts_of(names: Collection[str], config: DataConfig) -> tuple[str, ...]:
    """The columns of a row that may say whether its answer is good."""
    settled = _settled(names, config)
    return tuple(name for name in VERDICTS if name in names and name not in settled)


def require_no_verdict(row: Row, columns: tuple[str, ...], objective: str) -> None:
    """Refuse a row that says of its answer that it is good or bad: all would be learnt as good ones.

    Raises:
        InputError: it names the column.
    """
    for name in columns:
        value = row.fields[name]
        if isinstance(value, bool | int | str) and value in _SAID:
            rule = f"column {name} is {value!r}: an answer labelled good or bad, and objective={objective} learns all as good "
            rule += "ones"
            remedy = (
                f"Give a file of the good rows without that column. If it says something else: data.ignore=[{name}]"
            )
            raise InputError(row.place, rule, remedy)


def _settled(names: Collection[str], config: DataConfig) -> set[str]:
    """Columns that the config names."""
    mapped = {part for theirs in config.columns.values() for part in parts_of(theirs, names)}
    return mapped | set(config.ignore) | ({config.group} if config.group else set())


def _one_of(fields: dict[str, Any], names: tuple[str, ...], prefix: str) -> str:
    """How to train on the better answer alone."""
    if len(names) == 1:
        return f"To learn from the other answer: data.ignore=[{names[0]}]"
    better, worse = names
    value = fields[better]
    ours = "response" if any(name in fields for name in ALIASES["prompt"]) else "text"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        first = value[0].get("role", value[0].get("from"))
        ours = "response" if ours == "response" and first in ("assistant", "gpt") else "messages"
    objective = f" objective={reading_text().name}" if ours == "text" else ""
    spoken = value[0] if isinstance(value, list) and value else value
    if isinstance(spoken, dict) and spoken.get("role", spoken.get("from")) in ("assistant", "gpt"):
        before = next((name for name in ALIASES["messages"] if name in fields), None)
        if before is not None:  # the turns before the answers stand apart from them
            return f"To learn from {better}: {prefix}.prompt={before} {prefix}.response={better} data.ignore=[{worse}]"
    which = f"from {better}" if better.startswith("chosen") else "from one of them"
    return f"To learn {which}: {prefix}.{ours}={better} data.ignore=[{worse}]{objective}"
