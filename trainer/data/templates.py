"""Render conversations through the chat template and find which tokens are the assistant's.

With `{% generation %}` marks in the template, transformers gives the mask. Without, the spans are found in the rendered text:
a turn starts where the template, given the messages before it and `add_generation_prompt`, ends; it reaches over its content
to the end of the token that closes a turn, which a probe conversation shows.
"""

from __future__ import annotations

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
        self.ends = ("", "") if self.has_marks else self._probe_ends()

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
        # A token may reach past the span over white space alone: some tokenizers let a turn's end swallow the line end.
        inside = [
            (i, j, any(a <= i < b and (j <= b or text[b:j].isspace()) for a, b in spans))
            for i, j in out["offset_mapping"]
        ]
        mask = [hit and i < j for i, j, hit in inside]
        return list(out["input_ids"]), mask

    def _span(self, messages: list[dict[str, str]], index: int, text: str, place: str) -> tuple[int, int]:
        before = self._apply(messages[:index], place, tokenize=False, add_generation_prompt=True)
        raw, (middle, last) = messages[index]["content"], self.ends
        if text.startswith(before):
            for end in (last, middle) if index == len(messages) - 1 else (middle,):
                for content in (raw, raw.strip()):  # some templates trim
                    found = text.find(content + end, len(before))
                    if found >= 0:
                        return len(before), found + len(content) + len(end)
        rule = f"the template renders turn {index} differently inside a conversation, so its tokens cannot be found"
        raise InputError(place, rule, "Give model.chat_template=<file> with {% generation %} marks around answers")

    def _probe_ends(self) -> tuple[str, str]:
        """What closes an answer in the middle of a conversation, and what closes the last one."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        last = self._apply(turns, "a probe conversation", tokenize=False).partition(PROBE)[2]
        try:
            middle = self._apply([*turns, turns[0]], "a probe conversation", tokenize=False).partition(PROBE)[2]
        except InputError:  # a template for single turns only
            middle = last
        return self._to_last_token(_common_prefix(last, middle)), self._to_last_token(last)

    def _to_last_token(self, end: str) -> str:
        """Cut what follows the last added token (`<|im_end|>`, `</s>`); without one, what follows the last line end."""
        tokens = [end.rfind(token) + len(token) for token in self.tokenizer.get_added_vocab() if token and token in end]
        return end[: max(tokens)] if tokens else end[: end.rfind("\n") + 1]

    def _apply(self, messages: list[dict[str, str]], place: str, **options):
        return render(self.tokenizer, messages, place, **options)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], place: str, **options):
    """`apply_chat_template`, whose failures name the row.

    Raises:
        InputError: the template fails on it.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # noqa: BLE001  a template is a program and can raise anything
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        rule = f"the chat template fails on this row: {said}"
        raise InputError(place, rule, "Mend the row, or give another model.chat_template") from None


def _common_prefix(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _block_names(template: str) -> set[str]:
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
