"""Render conversations through the chat template and find which tokens are the assistant's.

With `{% generation %}` marks in the template, transformers gives the mask. Without, the spans are found in the rendered text:
a turn starts where the template, given the messages before it and `add_generation_prompt`, ends; it goes on past its content
as far as the text agrees with what the template writes after a last answer (the turn's end, where the stop token is).
"""

from __future__ import annotations

import os.path

import jinja2
from transformers import PreTrainedTokenizerBase

from tritune.trainer.errors import InputError

PROBE = "tritune-probe-9f3c"


class ChatTemplate:
    """Messages -> token ids and a mask of the assistant's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            remedy = "Give model.chat_template=<file> or chatml, or a tokenizer that has one"
            raise InputError("model.chat_template=None", "the rows are conversations and there is no template", remedy)
        self.tokenizer = tokenizer
        self.has_marks = "generation" in _block_names(tokenizer.chat_template)
        self.turn_end = "" if self.has_marks else self._probe_turn_end()

    def encode(self, messages: list[dict[str, str]], place: str) -> tuple[list[int], list[bool]]:
        """Return token ids and, for each, whether the assistant says it.

        The template writes its own BOS, so none is added.
        """
        if self.has_marks:
            out = self._apply(messages, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
        text = self._apply(messages, place, tokenize=False)
        spans = [self._span(messages, i, text, place) for i, m in enumerate(messages) if m["role"] == "assistant"]
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(a <= i and j <= b and i < j for a, b in spans) for i, j in out["offset_mapping"]]
        return list(out["input_ids"]), mask

    def _span(self, messages: list[dict[str, str]], index: int, text: str, place: str) -> tuple[int, int]:
        before = self._apply(messages[:index], place, tokenize=False, add_generation_prompt=True)
        content = messages[index]["content"].strip()
        found = text.find(content, len(before))
        if not text.startswith(before) or found < 0:
            rule = f"the template renders turn {index} differently inside a conversation, so its tokens cannot be found"
            raise InputError(place, rule, "Give model.chat_template=<file> with {% generation %} marks around answers")
        end = found + len(content)
        return len(before), end + len(os.path.commonprefix([text[end:], self.turn_end]))

    def _probe_turn_end(self) -> str:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        return self._apply(messages, "the chat template", tokenize=False).partition(PROBE)[2]

    def _apply(self, messages: list[dict[str, str]], place: str, **options):
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:  # what a template can raise
            rule = f"the chat template fails on this row: {str(error).strip().splitlines()[0]}"
            raise InputError(place, rule, "Mend the row, or give another model.chat_template") from None


def _block_names(template: str) -> set[str]:
    """The words that open `{% ... %}` blocks."""
    names = set()
    for part in template.split("{%")[1:]:
        words = part.lstrip("-+ \n").split(None, 1)
        if words:
            names.add(words[0].rstrip("-%}"))
    return names
