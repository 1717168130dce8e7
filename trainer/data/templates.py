"""Chat templates as programs: messages -> text, and where in it `{% generation %}` marks stand.

Templates are rendered directly in our sandbox, not by `apply_chat_template`, which costs more than the tokens do; the text is the
same, which the tests hold for every template they have.
"""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data import sandbox
from tritune.trainer.data.sandbox_limits import Refused
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError

ERROR_CHARS = 500  # of what a template says
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one thing: templates read the first or the second


class Program:
    """A tokenizer's chat template, compiled.

    Raises:
        InputError: there is no template, or it is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            remedy = "Give model.chat_template=<file> or chatml, or a tokenizer that has one"
            raise InputError("model.chat_template=None", "the rows are conversations and there is no template", remedy)
        self.source: str = tokenizer.chat_template
        self._name = f"the chat template{f' of {tokenizer.name_or_path}' if tokenizer.name_or_path else ''}"
        self._compiled = sandbox.compile_template(self.source)
        self._special = dict(tokenizer.special_tokens_map)

    def run(
        self, messages: list[dict], place: str, tools: list | None = None, **options: Any
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and the marks if their place is known. `options` are variables of the template.

        Raises:
            InputError: the template fails, or is stopped by a limit; it names the row.
        """
        values = {**self._special, "tools": None, "documents": None, "add_generation_prompt": False, **options}
        values["messages"] = [_message(message) for message in messages]
        if tools is not None:
            values["tools"] = _plain(tools)
        try:
            return sandbox.run(self._compiled, values)
        except Refused as error:
            rule = f"{self._name} was stopped on this row: {error}"
        except Exception as error:  # noqa: BLE001  a template is a program and can raise anything
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            rule = f"the chat template fails on this row: {said[:ERROR_CHARS]}"
        remedy = "Mend the row, or give another model.chat_template"
        if any(message.get("role") == "system" for message in messages):
            remedy = f"Where it knows no system role, data.system_turn=merge. Else {remedy[0].lower()}{remedy[1:]}"
        raise InputError(place, rule, remedy)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], place: str, **options: Any) -> str:
    """Return a conversation's text; `options` are variables of the template (`add_generation_prompt`, `tools`, ...).

    Raises:
        InputError: there is no template, it fails on the conversation, or is stopped by a limit.
    """
    return Program(tokenizer).run(messages, place, **options)[0]


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


def block_names(template: str) -> set[str]:
    """The words that open `{% ... %}` blocks.

    Raises:
        InputError: the template is not valid Jinja.
    """
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError as error:
        raise InputError("model.chat_template", f"it is not valid Jinja: {error}", "Mend the template") from None
    words = [(kind, word) for _, kind, word in tokens if kind != "whitespace"]
    return {words[i + 1][1] for i, (kind, _) in enumerate(words[:-1]) if kind == "block_begin"}
