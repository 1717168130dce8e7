"""The forms in which the field writes a row of a chat, each read into one: turns of a conversation, or prompt and response.

Alpaca's `instruction`, `input`, `output` with `system` and `history`, Dolly's `context`, prompts and completions that are texts
or lists of messages, ShareGPT's and OpenAI's conversations beside a column of their own for the system turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tritune.trainer.config.choices import SystemTurn
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.columns import parts_of
from tritune.trainer.data.row_limits import SKIP, require_text, require_texts, said
from tritune.trainer.data.turns import SPEAKERS, from_text, merged_system, turns
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

Turns = list[dict[str, Any]]


def conversation(row: Row, columns: Mapping[str, str], config: DataConfig) -> Turns:
    """The turns of a row of messages, after those of its column for the system turn.

    Raises:
        InputError: a message is none, or there are two system turns that differ.
    """
    messages = turns(row.fields[columns["messages"]], row.place, columns["messages"], config)
    system = _system(row, columns)
    if system and messages[0]["role"] == "system":
        if messages[0]["content"] != system[0]["content"]:
            rule = f"column {columns['system']} and the first message are two system turns that differ"
            remedy = f"Keep one of them: data.ignore=[{columns['system']}] leaves the column out. Or {SKIP}"
            raise InputError(row.place, rule, remedy)
        system = []
    return merged(system + messages, config)


def pair(row: Row, columns: Mapping[str, str], config: DataConfig) -> tuple[str, str] | Turns:
    """A prompt and its response, both texts; or the turns that they are with what stands before them.

    Raises:
        InputError: a value of a type that is not read.
    """
    before = asked(row, columns, config)
    answer = _spoken(row, columns["response"], config)
    if isinstance(before, str) and isinstance(answer, str):
        return before, answer
    return merged(_as_turns(before, "user") + _as_turns(answer, "assistant"), config)


def asked(row: Row, columns: Mapping[str, str], config: DataConfig) -> str | Turns:
    """What stands before the answer of a row of prompt and response: its prompt and input as a text where nothing else does,
    else turns.

    Raises:
        InputError: a value of a type that is not read.
    """
    prompt = _spoken(row, columns["prompt"], config)
    extra = value_of(row, columns["input"], empty=True) if "input" in columns else ""
    if isinstance(prompt, str):
        prompt += f"\n\n{extra}" if extra and prompt else extra
    elif extra:
        rule = f"column {columns['prompt']} is a list of messages, and column {columns['input']} has a text besides"
        raise InputError(row.place, rule, f"data.ignore=[{columns['input']}] leaves it out. Or {SKIP}")
    before = _system(row, columns) + (_history(row, columns["history"], config) if "history" in columns else [])
    return prompt if isinstance(prompt, str) and not before else before + _as_turns(prompt, "user")


def merged(messages: Turns, config: DataConfig) -> Turns:
    """With the system turns where `data.system_turn` wants them."""
    return merged_system(messages) if config.system_turn is SystemTurn.merge else messages


def value_of(row: Row, theirs: str, empty: bool = False, truths: bool = False) -> str:
    """The text of a column, or of several joined by a line end; a whole number is one, too.

    Args:
        empty: null is the empty text.
        truths: true and false are words.

    Raises:
        InputError: it is none.
    """
    value = row.fields.get(theirs)
    if truths and isinstance(value, bool):
        return "true" if value else "false"
    if type(value) is str:
        return require_text(value, row.place)
    parts = parts_of(theirs, row.fields.keys())
    if len(parts) > 1:
        return "\n".join(value_of(row, part, empty) for part in parts)
    if value is None and empty:
        return ""
    if value != value and empty:  # NaN, as pandas writes what is missing
        return ""
    if isinstance(value, float) and value.is_integer():  # whole numbers of a column with nulls
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        rule = f"column {theirs} is {bounded(said(value), 60)}, and must be text"
        raise InputError(row.place, rule, f"Mend the row, or {SKIP}")
    return require_text(str(value), row.place)


def tools_of(row: Row, column: str) -> list[Any] | None:
    """The tools a conversation may call: JSON schemas, each a `function`; a list, or the JSON text of one."""
    value: Any = row.fields[column]
    if isinstance(value, str) and value.strip():
        value = from_text(value, row.place, column)
    if value is not None and value != "" and not isinstance(value, list):
        raise InputError(row.place, f"column {column} is no list of tools", f"Write a list of JSON schemas, or {SKIP}")
    require_texts(value, row.place)
    return [_tool(tool, row.place, column) for tool in value] if value else None


def _tool(tool: Any, place: str, column: str) -> Any:
    """A tool as OpenAI writes it; its bare schema is put into `function`."""
    if isinstance(tool, str):
        tool = from_text(tool, place, column)
    if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" or v != "function"}}
    return tool


def _spoken(row: Row, theirs: str, config: DataConfig) -> str | Turns:
    """A prompt or a response: a text, or messages, which may stand in a cell as JSON."""
    value: Any = row.fields.get(theirs)
    if isinstance(value, str) and value.startswith("[{") and _are_messages(value):
        value = json.loads(value)
    parts = value if isinstance(value, list) else [value]
    if parts and isinstance(parts[0], dict) and ("role" in parts[0] or "from" in parts[0]):
        return turns(parts, row.place, theirs, config)
    return value_of(row, theirs)


def _are_messages(text: str) -> bool:
    """Whether a text is messages and nothing that is to be read as it stands, such as other JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    names = (("role", "content"), ("from", "value"))
    return all(
        isinstance(part, dict) and any(who in part and what in part and part[who] in SPEAKERS for who, what in names)
        for part in value
    )


def _as_turns(said_: str | Turns, role: str) -> Turns:
    return [{"role": role, "content": said_}] if isinstance(said_, str) else said_


def _system(row: Row, columns: Mapping[str, str]) -> Turns:
    text = value_of(row, columns["system"], empty=True) if "system" in columns else ""
    return [{"role": "system", "content": text}] if text else []


def _history(row: Row, column: str, config: DataConfig) -> Turns:
    """Earlier turns: pairs of question and answer, messages, or the JSON text of either."""
    value: Any = row.fields[column]
    if isinstance(value, str):
        value = from_text(value, row.place, column) if value.strip() else []
    if not value:
        return []
    if isinstance(value, list) and isinstance(value[0], dict):
        return turns(value, row.place, column, config)
    found: Turns = []
    for part in value if isinstance(value, list) else [None]:
        if not isinstance(part, list) or len(part) != 2 or not all(isinstance(text, str) for text in part):
            rule = f"column {column} holds {bounded(said(part), 60)}, which is no pair of a question and its answer"
            raise InputError(row.place, rule, f"Write [[question, answer], ...], or data.ignore=[{column}]")
        require_texts(part, row.place)
        found += [{"role": "user", "content": part[0]}, {"role": "assistant", "content": part[1]}]
    return found
