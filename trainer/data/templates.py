"""Render conversations through the chat template, and find which of their tokens are trained (`turns.py`).

Templates are rendered directly in our sandbox, not by `apply_chat_template`, which costs more than the tokens do; the text is the
same, which the tests hold for every template they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data import isolated, sandbox
from tritune.trainer.data.confined import Confined
from tritune.trainer.data.rendering import answers, served
from tritune.trainer.data.rendering import run as _run
from tritune.trainer.data.turns import ASSISTANT, Rendered, Turns, shared, template_name
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded


class ChatTemplate:
    """Messages -> text and the spans in it that are trained.

    The assistant's turns are trained from the first character that the model itself has to write to the end of the token that
    closes the turn; turns of other roles from their content (not their header) to the end of such a token, where there is one.
    With marks, exactly what is marked is the assistant's; turns of other roles are found by rendering, as without marks.

    Args:
        train_on: roles whose turns are trained.
        last_only: of these turns only the last. With marks: of the assistant's, those marks by which the conversation has more
            than what stands before its last answer, at least the last one.

    Raises:
        InputError: there is no template, or it is not valid.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: Sequence[str] = (ASSISTANT,), last_only: bool = False
    ) -> None:
        if not tokenizer.chat_template:
            remedy = "Give model.chat_template=<file> or chatml, or a tokenizer that has one"
            raise InputError("model.chat_template=None", "the rows are conversations and there is no template", remedy)
        self._turns = turns = Turns(tokenizer, train_on, last_only)
        self.train_on, self.last_only, self.has_marks = turns.train_on, last_only, turns.has_marks
        self._process = Confined(partial(served, partial(_rendered, turns)))  # no cycle: it ends with its last user

    def render_all(self, rows: Sequence[tuple[list[dict], str, list | None]]) -> list[Rendered | InputError]:
        """Render (messages, place, tools) one by one, in another process unless this is one that can be ended; in the place
        of a row that fails its fault.

        Raises:
            InputError: rows ended that process: the template is refused, whatever becomes of bad rows.
        """
        if isolated.can_be_limited():
            with isolated.limited():
                return [self._rendered(*row) for row in rows]
        found = answers(self._process, rows, self._turns.name, [place for _, place, _ in rows])
        return [one if isinstance(one, InputError) else Rendered(*one) for one in found]

    def _rendered(self, messages: list[dict], place: str, tools: list | None) -> Rendered | InputError:
        try:
            return self._turns.render(messages, place, tools)
        except InputError as error:
            return error

    def render(self, messages: list[dict], place: str, tools: list | None = None) -> Rendered:
        """Return the text of a conversation, which has its own BOS, and its trained spans.

        Raises:
            InputError: the template fails, is stopped by a limit, or writes a turn differently inside a conversation.
        """
        return self._turns.render(messages, place, tools)

    def prompt(self, messages: list[dict], place: str, tools: list | None = None) -> str:
        """Return the text up to where the assistant begins to speak.

        Raises:
            InputError: the template fails, or is stopped by a limit.
        """
        return self._turns.prompt(messages, place, tools)


def _rendered(turns: Turns, messages: list[dict], place: str, tools: list | None) -> tuple[str, list[tuple[int, int]]]:
    rendered = turns.render(messages, place, tools)
    return rendered.text, rendered.spans


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], place: str, **options: Any) -> str:
    """Return a conversation's text; `options` are variables of the template (`add_generation_prompt`, `tools`, ...).

    Raises:
        InputError: the template fails on it, or is stopped by a limit.
    """
    program = sandbox.compile_template(tokenizer.chat_template)
    return _run(program, template_name(tokenizer), tokenizer.special_tokens_map, messages, place, **options)[0]


def token_spans(encoding: Encoding, rendered: Rendered) -> list[tuple[int, int]]:
    """Token spans `[start, stop)` to be trained, one for each of `rendered.spans`, empty where it has no token of its own.

    A token is inside when it lies in the span. It may reach past the span's end over white space alone: some tokenizers let a
    turn's end swallow the line end. One that begins before the span is not trained, although transformers' mask has it: it is
    not what the model is asked for after the prompt. Tokens of no width are left out at a span's ends; the few tokenizers that
    make such have none within one.

    Args:
        encoding: of `rendered.text`, without special tokens.
    """
    return [_tokens_in(encoding, rendered.text, start, stop) for start, stop in rendered.spans]


def _tokens_in(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int]:
    chars, first, last = encoding.token_to_chars, None, None
    left, right = start, stop - 1
    while left <= right and (first := encoding.char_to_token(left)) is None:  # a character that no token has
        left += 1
    while right >= left and (last := encoding.char_to_token(right)) is None:
        right -= 1
    if first is None or last is None:
        return 0, 0
    while first <= last and (chars(first) or (0, 0))[0] < start:
        first += 1
    # A character can have several tokens, its bytes; what was found is the first of them.
    while last + 1 < len(encoding) and (after := chars(last + 1)) is not None and after[0] < min(stop, after[1]):
        last += 1
    while last >= first and (end := (chars(last) or (0, 0))[1]) > stop and not text[stop:end].isspace():
        last -= 1
    return (first, last + 1) if first <= last else (0, 0)


def verify(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[dict],
    place: str,
    tools: list | None = None,
) -> str | None:
    """Re-tokenize a conversation's trained answers; return what is wrong, None when nothing is.

    Wrong is: the tokens before a trained answer are not those that inference feeds (`prompt`), so the model is trained on
    something that it will not meet; or the answer's tokens do not spell its content.

    Raises:
        InputError: the template fails.
    """
    rendered = template.render(messages, place, tools)
    encoding = tokenizer(rendered.text, add_special_tokens=False)[0]
    spans = [span for span in token_spans(encoding, rendered) if span[0] < span[1]]
    turns = [i for i, m in enumerate(messages) if m["role"] in template.train_on]
    for index in turns[-1:] if template.last_only else turns:
        if messages[index]["role"] != ASSISTANT:
            continue
        prompt = tokenizer(template.prompt(messages[:index], place, tools), add_special_tokens=False)["input_ids"]
        same = shared(encoding.ids, prompt)
        if same < len(prompt):
            there, here = (tokenizer.convert_ids_to_tokens(ids[same : same + 3]) for ids in (prompt, encoding.ids))
            return f"turn {index}: token {same} before the answer is {here} in training and {there} when the model is asked"
        span = next((span for span in spans if span[0] >= same), None)
        if span is None or span[0] > same:
            found = "none is trained" if span is None else f"the first that is trained is token {span[0]}"
            return f"turn {index}: the model is asked for token {same}, and {found}"
        content = messages[index].get("content")
        spelt = tokenizer.decode(encoding.ids[slice(*span)], clean_up_tokenization_spaces=False)
        if isinstance(content, str) and content.strip() not in spelt:
            return f"turn {index}: its tokens spell {bounded(str(spelt), 80)!r}, and its content is {bounded(content, 80)!r}"
    return None


def double_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether a text begins with two BOS tokens: the template wrote one and the tokenizer another."""
    return tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2
