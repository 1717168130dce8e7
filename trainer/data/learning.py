"""Rows that were made for another kind of learning than from examples: pairs of answers, and answers labelled good or bad."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tritune.trainer.config_data import DataConfig
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.columns import ALIASES, parts_of
from tritune.trainer.errors import InputError

# Columns that stand together in rows of one better and one worse answer.
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("rejected_response",), ("rejected_messages",),
    ("response_0", "response_1"), ("response_a", "response_b"), ("answer_0", "answer_1"),
)  # fmt: skip
# Columns that say whether the answer of a row is a good one.
VERDICTS = ("label", "kto_tag")
_SAID = (True, False, 0, 1, "true", "false", "True", "False", "0", "1")


def require_one_answer(row: Row, config: DataConfig, prefix: str) -> None:
    """Refuse rows of two answers of which one is better, unless the config names which of their columns is read.

    Args:
        prefix: the config key of the mapping, for the remedy.

    Raises:
        InputError: it names the columns.
    """
    settled = _settled(row.fields.keys(), config)
    for names in PAIRS:
        if all(name in row.fields for name in names) and settled.isdisjoint(names):
            rule = f"it has {' and '.join(names)}: a row of preferences, and objective=sft learns from one answer each"
            raise InputError(row.place, rule, _one_of(row.fields, names, prefix))


def verdicts_of(names: Collection[str], config: DataConfig) -> tuple[str, ...]:
    """The columns of a row that may say whether its answer is good."""
    settled = _settled(names, config)
    return tuple(name for name in VERDICTS if name in names and name not in settled)


def require_no_verdict(row: Row, columns: tuple[str, ...]) -> None:
    """Refuse a row that says of its answer that it is good or bad: all would be learnt as good ones.

    Raises:
        InputError: it names the column.
    """
    for name in columns:
        value = row.fields[name]
        if isinstance(value, bool | int | str) and value in _SAID:
            rule = (
                f"column {name} is {value!r}: an answer labelled good or bad, and objective=sft learns all as good ones"
            )
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
    objective = " objective=pretrain" if ours == "text" else ""
    which = f"from {better}" if better.startswith("chosen") else "from one of them"
    return f"To learn {which}: {prefix}.{ours}={better} data.ignore=[{worse}]{objective}"
