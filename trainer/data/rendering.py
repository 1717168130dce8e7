"""Run a chat template on a conversation, never in this process: in one that the system's limits end, row by row.

What loops or grows is stopped by the sandbox itself, which says why; C code, and what crashes, by the process (`confined.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jinja2
from tritune.trainer.data import isolated, sandbox
from tritune.trainer.data.confined import Confined, Ended, EndedTooOftenError
from tritune.trainer.data.sandbox_limits import Refused
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError

ERROR_CHARS = 500  # of what a template says
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one thing: templates read the first or the second
# What the template of a classifier by token answers to any other conversation (`label_prompt`), which no row can mend.
ONE_TEXT = "This model reads one text, in one turn of the user, and answers with a label"
_REMEDY = "Mend the row, or give another model.chat_template"
_ANOTHER = "It is a classifier's: to read conversations, give model.chat_template=plain, chatml or a Jinja file"


def run(program: jinja2.Template, name: str, special: dict, messages: list[dict], place: str, **options: Any):
    """Return a conversation's text, and where its `{% generation %}` blocks stand, if that is known.

    Args:
        name: of the template, in messages. special: the tokenizer's special tokens by name.
        place: of the row, which failures name. options: variables of the template (`add_generation_prompt`, `tools`, ...).

    Raises:
        InputError: the template fails, or is stopped by a limit.
    """
    if isolated.watched():
        return _run_here(program, name, special, messages, place, options)
    [answer] = answers(_process(program), [(name, special, messages, place, options)], name, [place])
    if isinstance(answer, InputError):
        raise answer
    return answer


def answers(process: Confined, items: Sequence[Any], name: str, places: Sequence[str]) -> list[Any]:
    """Return what the process answers for each item, faults and ends as InputErrors.

    Raises:
        InputError: the template ended its process again.
    """
    try:
        found = process(items)
    except EndedTooOftenError as error:
        rule = f"{name} was stopped again, on {places[error.index]}: {error.why}"
        raise InputError("model.chat_template", rule, "Give another: model.chat_template=<file> or chatml") from None
    return [_answer(answer, name, place) for answer, place in zip(found, places, strict=True)]


def _answer(answer: Any, name: str, place: str) -> Any:
    if isinstance(answer, Ended):
        return InputError(place, f"{name} was stopped on this row: {answer.why}", _REMEDY)
    return InputError(*answer[1:]) if answer[0] == "fault" else answer[1:]


def served(work: Any, item: Any) -> tuple:
    """What the process answers: plain values, a fault by its three parts."""
    try:
        return ("done", *work(*item))
    except InputError as error:
        return ("fault", error.value, error.rule, error.remedy)


@lru_cache(maxsize=8)
def _process(program: jinja2.Template) -> Confined:
    return Confined(partial(served, partial(_run_here, program)))


def _run_here(program: jinja2.Template, name: str, special: dict, messages: list[dict], place: str, options: dict):
    values = {**special, "tools": None, "documents": None, "add_generation_prompt": False, **options}
    values["messages"] = [_message(message) for message in messages]
    if values["tools"] is not None:
        values["tools"] = _plain(values["tools"])
    try:
        return sandbox.run(program, values)
    except Refused as error:
        rule = f"{name} was stopped on this row: {error}"
        raise InputError(place, rule, _remedy(messages)) from None
    except Exception as error:  # a template is a program and can raise anything
        if isolated.ran_out(error):
            raise  # which ends the process, and is said by the one that asked
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        rule = f"the chat template fails on this row: {said[:ERROR_CHARS].rstrip('.')}"
        raise InputError(place, rule, _ANOTHER if ONE_TEXT in said else _remedy(messages)) from None


def _remedy(messages: list[dict]) -> str:
    if any(message.get("role") == "system" for message in messages):
        return f"Where it knows no system role, data.system_turn=merge. Else {_REMEDY[0].lower()}{_REMEDY[1:]}"
    return _REMEDY


def _message(message: dict) -> dict:
    """A message as transformers hands it on: without None, its reasoning under both names, plain data only."""
    if len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str:
        return message
    message = {key: _plain(value) for key, value in message.items() if value is not None and key != UNTRAINED}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """Only JSON's types reach a template: methods of others could do anything. The rest becomes its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
