"""Which of a conversation's text is trained, by turn and role: it is found by rendering the conversation and its beginnings.

With `{% generation %}` marks the template's author says which text is the assistant's. Without, an answer starts where the
template, given the messages before it and `add_generation_prompt`, ends (what inference feeds); it reaches over its content to
the end of the token that closes the turn, which a probe conversation shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data import sandbox
from tritune.trainer.data.rendering import run
from tritune.trainer.errors import InputError

ASSISTANT = "assistant"
PROBE = "tritune-probe-9f3c"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and which characters are trained: `[start, stop)`, in order, disjoint."""

    text: str
    spans: list[tuple[int, int]]


class Turns:
    """The trained spans of conversations, by one template and one tokenizer. Arguments as of `templates.ChatTemplate`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: Sequence[str], last_only: bool) -> None:
        self.train_on, self.last_only = frozenset(train_on), last_only
        self.name = template_name(tokenizer)
        self._program = sandbox.compile_template(tokenizer.chat_template)
        self.has_marks = "generation" in _block_names(tokenizer.chat_template)
        self._special = dict(tokenizer.special_tokens_map)
        self._added = [token for token in tokenizer.get_added_vocab() if token]
        self._ends = ("", "") if self.has_marks else self._probe_ends()

    def render(self, messages: list[dict], place: str, tools: list | None = None) -> Rendered:
        """Return the text of a conversation, which has its own BOS, and its trained spans.

        A row of one turn is rendered twice, without or with marks that settle it once, and else once more for each trained turn.

        Raises:
            InputError: the template fails, is stopped by a limit, or writes a turn differently inside a conversation.
        """
        text, marks = self._run(messages, place, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] in self.train_on]
        if self.last_only:
            turns = turns[-1:]
        answers = [i for i in turns if messages[i]["role"] == ASSISTANT]
        if self.has_marks and answers:
            spans = self._marked(messages, marks, answers[-1], place, tools)
        else:
            spans = [self._answer(messages, i, text, place, tools) for i in answers]
        if len(answers) < len(turns):
            spans += [self._other_turn(messages, i, text, place, tools) for i in turns if i not in answers]
            spans.sort()
        return Rendered(text, spans)

    def prompt(self, messages: list[dict], place: str, tools: list | None = None) -> str:
        """Return the text up to where the assistant begins to speak.

        Raises:
            InputError: the template fails, or is stopped by a limit.
        """
        return self._run(messages, place, tools, add_generation_prompt=True)[0]

    def _run(self, messages: list[dict], place: str, tools: list | None, **options: Any):
        return run(self._program, self.name, self._special, messages, place, tools=tools, **options)

    def _marked(
        self, messages: list[dict], marks: list | None, answer: int, place: str, tools: list | None
    ) -> list[tuple[int, int]]:
        if marks is None:
            rule = (
                "the template's {% generation %} marks stand in a macro or a stored block, so their place is not known"
            )
            raise InputError(place, rule, "Give model.chat_template=<file> with the marks outside, or without any")
        if not self.last_only or len(marks) < 2:
            return list(marks)
        before = self._run(messages[:answer], place, tools)[1] or []
        return marks[-max(len(marks) - len(before), 1) :]

    def _answer(self, messages: list[dict], index: int, text: str, place: str, tools: list | None) -> tuple[int, int]:
        before = self.prompt(messages[:index], place, tools)
        if not text.startswith(before):
            raise _not_found(index, place)
        start, is_last, (middle, last) = len(before), index == len(messages) - 1, self._ends
        content = messages[index].get("content")
        if isinstance(content, str) and not messages[index].get("tool_calls"):
            for end in (last, middle) if is_last else (middle,):
                for written in (content, content.strip()):  # some templates trim
                    found = text.find(written + end, start)
                    if found >= 0:
                        return start, found + len(written) + len(end)
            raise _not_found(index, place)
        # Calls of tools stand before the turn's end, so that is the last token of what is the same without the later turns.
        through = len(text) if is_last else shared(text, self._run(messages[: index + 1], place, tools)[0])
        stop = start + len(self._to_last_token(text[start:through]))
        if stop == start:
            raise _not_found(index, place)
        return start, stop

    def _other_turn(
        self, messages: list[dict], index: int, text: str, place: str, tools: list | None
    ) -> tuple[int, int]:
        probe = [*messages[:index], {**messages[index], "content": PROBE}]
        head, found, tail = self._run(probe, place, tools)[0].partition(PROBE)
        content = messages[index].get("content")
        if found and isinstance(content, str) and text.startswith(head):
            start = len(head)
            for written in (content, content.strip()):
                if text.startswith(written, start):
                    stop = start + len(written)
                    common = shared(tail, text[stop : stop + len(tail)])
                    return start, stop + len(self._to_last_token(tail[:common]))
        raise _not_found(index, place)

    def _probe_ends(self) -> tuple[str, str]:
        """What closes an answer in the middle of a conversation, and what closes the last one."""
        place, turns = "a probe conversation", [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": PROBE}]
        last = self._run(turns, place, None)[0].partition(PROBE)[2]
        try:
            middle = self._run([*turns, turns[0]], place, None)[0].partition(PROBE)[2]
        except InputError:  # a template for single turns only
            middle = last
        return self._to_last_token(last[: shared(last, middle)]), self._to_last_token(last)

    def _to_last_token(self, end: str) -> str:
        """Cut what follows the last added token (`<|im_end|>`, `</s>`); without one, what follows the last line end."""
        tokens = [end.rfind(token) + len(token) for token in self._added if token in end]
        return end[: max(tokens)] if tokens else end[: end.rfind("\n") + 1]


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"


def _not_found(index: int, place: str) -> InputError:
    rule = f"the template renders turn {index} differently inside a conversation, so its tokens cannot be found"
    return InputError(place, rule, "Give model.chat_template=<file> with {% generation %} marks around answers")


def shared(a: Sequence, b: Sequence) -> int:
    """How long their common beginning is."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


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
