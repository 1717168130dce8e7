"""Messages in the field's spellings -> one: role and content as a text, calls of tools as `tool_calls`, loss flags as one mark.

Read are OpenAI's (content parts, `developer`, `function_call`), ShareGPT's (`from` and `value`, `human`, `gpt`, ...), Anthropic's
parts (`tool_use`, `tool_result`, `thinking`) and Gemini's (`model`, `parts`). Other keys of a message are left for the template.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from tritune.trainer.config.data import ROLES, DataConfig
from tritune.trainer.data.columns import FLAGS
from tritune.trainer.data.row_limits import SKIP, require_text, require_texts, said, too_deep
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

UNTRAINED = "__untrained__"  # the key of a message that its row says is not to be learnt; no template reads it
_CALL = "call"
# What others call the roles.
SPEAKERS = {
    **{role: role for role in ROLES},
    "developer": "system", "human": "user", "prompter": "user",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "ai": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool",
    "function_call": _CALL, "tool_call": _CALL,
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "parts")
# Keys of objects that hold a question with its answer, and maybe a system turn.
_PAIRS = {"system": ("system",), "user": ("human", "user", "input", "question"),
          "assistant": ("assistant", "bot", "gpt", "output", "answer")}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text", None)


def turns(value: Any, place: str, column: str, config: DataConfig) -> list[dict[str, Any]]:
    """The turns of a conversation: `role`, `content` (a text, or None beside `tool_calls`) and what else a template may read.

    Args:
        value: a list of messages or the JSON text of one.
        column: where it stands, for messages.
        config: its `ignore` names keys of messages that are left out.

    Raises:
        InputError: it is none, a message has no known role or no content that is text, or a loss flag cannot be obeyed.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = from_text(value, place, column)
    if not isinstance(value, list) or not value:
        rule = f"column {column} is not a list of messages"
        raise InputError(place, rule, f'Write [{{"role": ..., "content": ...}}], or {SKIP}')
    found: list[dict[str, Any]] = []
    strings = len(value) > 1 and all(isinstance(message, str) for message in value)  # who speaks alternates
    for index, message in enumerate(value):
        if type(message) is dict and len(message) == 2:  # the form of nearly all, untouched
            role, content = message.get("role"), message.get("content")
            if type(role) is str and type(content) is str and role in _KNOWN:
                if not content.isascii() or "\0" in content:
                    require_text(content, place)
                found.append(message)
                continue
        if type(message) is str and strings:
            found.append({"role": ("user", "assistant")[index % 2], "content": require_text(message, place)})
            continue
        found += _turn(message, index, place, config)
    return found


_KNOWN = frozenset(ROLES)


def from_text(text: str, place: str, column: str) -> Any:
    """Lists and objects that stand in a cell as JSON, or as Python prints them.

    Raises:
        InputError: it is neither.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise too_deep(place) from None
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())  # literals alone: nothing is run
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            rule = f"column {column} is not JSON: {error}"
            raise InputError(place, rule, f"Write it by json.dumps, or {SKIP}") from None


def _turn(message: Any, index: int, place: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """One message in any spelling, as one turn or several."""
    if not isinstance(message, dict):
        raise _unknown(message, index, place)
    # Parquet fills the keys that other rows have with None.
    fields = {
        key: value
        for key, value in message.items()
        if value is not None and key not in config.ignore and key != UNTRAINED
    }
    role_key = next((key for key in _ROLE_KEYS if key in fields), None)
    name = fields.pop(role_key) if role_key is not None else None
    role = SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None and role_key is not None:
        raise _unknown(message, index, place)
    require_texts(message, place)
    if role is None:
        yield from _pair(message, fields, index, place)
        return
    content_key = next((key for key in _CONTENT_KEYS if key in fields), None)
    content = fields.pop(content_key) if content_key is not None else None
    trained = _is_trained(fields, index, role, place, config)
    if role == _CALL:
        role, content, fields["tool_calls"] = "assistant", None, content
    content, calls, results = _spoken(content, fields, role, index, place)
    calls += _calls(fields, index, place)
    yield from results  # they stand before what the user says to them
    if content is None and results:
        return
    if content is None and not calls:
        raise _unknown(message, index, place)
    turn = {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **fields}
    yield turn if trained else {**turn, UNTRAINED: True}


def _unknown(message: Any, index: int, place: str) -> InputError:
    rule = f"message {index} is {bounded(said(message), 80)}, without a known role and a text content"
    return InputError(place, rule, f"Roles are {', '.join(ROLES)}; content is a string. Mend it, or {SKIP}")


def _pair(message: dict, fields: dict[str, Any], index: int, place: str) -> Iterator[dict[str, Any]]:
    """A question with its answer: `{"human": ..., "assistant": ...}`, `{"input": ..., "output": ...}`."""
    spoken = [(role, fields[key]) for role, keys in _PAIRS.items() for key in keys if key in fields]
    roles = [role for role, text in spoken if text != ""]
    if not {"user", "assistant"} <= {role for role, _ in spoken} or len(set(roles)) < len(roles):
        raise _unknown(message, index, place)
    if len(spoken) < len(fields) or not all(isinstance(text, str) for _, text in spoken):
        raise _unknown(message, index, place)
    yield from ({"role": role, "content": text} for role, text in spoken if text != "" or role != "system")


def _is_trained(fields: dict[str, Any], index: int, role: str, place: str, config: DataConfig) -> bool:
    """What a message's loss flags say; they are taken out. A weight of 1 asks for nothing: it may stand at every turn."""
    trained = True
    for name in FLAGS:
        if name in fields and (value := flag_of(fields[name], name, place, f" of message {index}")) is not None:
            if value and name in ("train", "loss") and role in ROLES and role not in config.train_on:
                rule = f"message {index} is to be learnt by its {name}, and turns of {role} are not trained"
                more = ",".join([*config.train_on, role])
                raise InputError(place, rule, f"data.train_on=[{more}] trains them, or data.ignore=[{name}]")
            del fields[name]
            trained = trained and value
    if "train_detail" in fields:
        rule = f"message {index} has train_detail: parts of a turn are not trained apart"
        raise InputError(place, rule, "Write train=true or false for the turn, or data.ignore=[train_detail]")
    return trained


def flag_of(value: Any, name: str, place: str, where: str = "") -> bool | None:
    """What a loss flag says: whether to train; None where it is empty, or a word that is none.

    Raises:
        InputError: it is a weight between, or above.
    """
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "false"):
            return word == "true"
        try:
            value = float(word)
        except ValueError:
            return None
    if value is None or not isinstance(value, bool | int | float) or value != value:
        return None
    if value not in (0, 1):
        rule = f"{name}{where} is {value}: a turn or row is trained (1) or not (0), with no weight between"
        raise InputError(place, rule, f"Write 0 or 1, or data.ignore=[{name}] trains all alike")
    return bool(value)


def _spoken(
    content: Any, fields: dict[str, Any], role: str, index: int, place: str
) -> tuple[str | None, list[dict[str, Any]], list[dict[str, Any]]]:
    """Content as text, the calls in its parts, and results of tools in them as turns of their own."""
    if content is None or isinstance(content, str):
        return content, [], []
    if role == "tool" and not _is_parts(content):  # what a tool gave back, as it gave it
        return json.dumps(content, ensure_ascii=False), [], []
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise _unknown({"role": role, "content": content}, index, place)
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _TEXT_PARTS and isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "tool_use":
            calls.append(
                _call({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}, index, place)
            )
        elif kind == "tool_result":
            text = _spoken(part.get("content"), {}, "tool", index, place)[0]
            results.append({"role": "tool", "content": text or "", "tool_call_id": part.get("tool_use_id")})
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            fields["reasoning_content"] = part.get(kind, part.get("text"))
        else:
            rule = f"message {index} has a part of type {kind}, and only text is read"
            raise InputError(place, rule, f"Take the part out, or {SKIP}")
    return "\n".join(texts) if texts or not (calls or results) else None, calls, results


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(p, dict) and "type" in p for p in content)


def _calls(fields: dict[str, Any], index: int, place: str) -> list[dict[str, Any]]:
    """The calls of `tool_calls`, or of OpenAI's older `function_call`; both are taken out."""
    given = [fields.pop(name) for name in ("tool_calls", "function_call") if name in fields]
    found = []
    for value in given:
        if isinstance(value, str):
            value = from_text(value, place, f"message {index}") if value.strip() else []
        found += value if isinstance(value, list) else [value]
    return [_call(call, index, place) for call in found]


def _call(call: Any, index: int, place: str) -> dict[str, Any]:
    """A call in one spelling: `function` with `name` and `arguments` as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        rule = f"message {index} calls {bounded(said(call), 80)}, which has no name"
        raise InputError(place, rule, f'Write {{"name": ..., "arguments": {{...}}}}, or {SKIP}')
    arguments: Any = next((function[n] for n in ("arguments", "parameters") if function.get(n) is not None), {})
    if isinstance(arguments, str):
        arguments = _object(arguments, index, place)
    rest = {} if function is call else {k: v for k, v in call.items() if k != "function" and v is not None}
    if function is call and call.get("id") is not None:
        rest["id"] = call["id"]
    kept = {
        k: v
        for k, v in function.items()
        if k not in ("id", "type", "name", "arguments", "parameters") and v is not None
    }
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments, **kept}}


def _object(text: str, index: int, place: str) -> Any:
    """Arguments that are written as JSON text; an empty text stands for none."""
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        rule = f"message {index} calls a tool with arguments that are not JSON: {bounded(text, 60)}"
        raise InputError(place, rule, f"Write them as an object, or {SKIP}") from None


def merged_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With each system turn put before the words of the user's next turn; one that no user's follows becomes a user's."""
    found: list[dict[str, Any]] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"] or "")
            continue
        if held and message["role"] == "user":
            message = {**message, "content": "\n\n".join(filter(None, [*held, message["content"] or ""]))}
        elif held:
            found.append({"role": "user", "content": "\n\n".join(held)})
        held = []
        found.append(message)
    return [*found, {"role": "user", "content": "\n\n".join(held)}] if held else found
