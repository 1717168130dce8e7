"""Chat templates as programs: messages -> text, and where in it `{% generation %}` marks stand.

Templates are rendered directly in our sandbox, not by `apply_chat_template`, which costs more than the tokens do; the text is the
same, which the tests hold for every template they have.
"""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data import rendering, sandbox
from tritune.trainer.errors import InputError


class Program:
    """A tokenizer's chat template, compiled.

    Raises:
        InputError: there is no template, or it is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            remedy = "Give model.chat_template=plain, chatml or <file>, or a tokenizer that has one"
            raise InputError("model.chat_template=None", "the rows are conversations and there is no template", remedy)
        self.source: str = tokenizer.chat_template
        self.name = f"the chat template{f' of {tokenizer.name_or_path}' if tokenizer.name_or_path else ''}"
        self._compiled = sandbox.compile_template(self.source)
        self._special = dict(tokenizer.special_tokens_map)

    def run(
        self, messages: list[dict], place: str, tools: list | None = None, **options: Any
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and the marks if their place is known. `options` are variables of the template.

        Raises:
            InputError: the template fails, or is stopped by a limit; it names the row.
        """
        return rendering.run(self._compiled, self.name, self._special, messages, place, tools=tools, **options)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], place: str, **options: Any) -> str:
    """Return a conversation's text; `options` are variables of the template (`add_generation_prompt`, `tools`, ...).

    Raises:
        InputError: there is no template, it fails on the conversation, or is stopped by a limit.
    """
    return Program(tokenizer).run(messages, place, **options)[0]


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
