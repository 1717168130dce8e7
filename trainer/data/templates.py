"""Render conversations through the chat template and find which of its text is trained, by turn and role.

With `{% generation %}` marks the template's author says which text is the assistant's. Without, an answer starts where the
template, given the messages before it and `add_generation_prompt`, ends (what inference feeds); it reaches over its content to
the end of the token that closes the turn, which a probe conversation shows.

Templates are rendered directly in our sandbox, not by `apply_chat_template`, which costs more than the tokens do; the text is the
same, which the tests hold for every template they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data import sandbox
from tritune.trainer.data.sandbox_limits import Refused
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

ASSISTANT = "assistant"
PROBE = "tritune-probe-9f3c"
ERROR_CHARS = 500  # of what a template says
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one thing: templates read the first or the second


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and which characters are trained: `[start, stop)`, in order, disjoint."""

    text: str
    spans: list[tuple[int, int]]


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
        self.train_on, self.last_only = frozenset(train_on), last_only
        self._name = _name(tokenizer)
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
        turns = [i for i, m in enumerate(messages) if m["role"] in self.train_on and UNTRAINED not in m]
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
        return _run(self._program, self._name, self._special, messages, place, tools=tools, **options)

    def _marked(
        self, messages: list[dict], marks: list | None, answer: int, place: str, tools: list | None
    ) -> list[tuple[int, int]]:
        if marks is None:
            rule = (
                "the template's {% generation %} marks stand in a macro or a stored block, so their place is not known"
            )
            raise InputError(place, rule, "Give model.chat_template=<file> with the marks outside, or without any")
        wanted = [UNTRAINED not in m for m in messages if m["role"] == ASSISTANT]
        if not all(wanted):
            if len(marks) != len(wanted):
                rule = "a turn is flagged as not to be learnt, and the template's marks are not one for each answer"
                raise InputError(place, rule, "Give model.chat_template=<file> without marks")
            marks = [mark for mark, kept in zip(marks, wanted, strict=True) if kept]
            return marks[-1:] if self.last_only else marks
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
        through = len(text) if is_last else _shared(text, self._run(messages[: index + 1], place, tools)[0])
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
                    shared = _shared(tail, text[stop : stop + len(tail)])
                    return start, stop + len(self._to_last_token(tail[:shared]))
        raise _not_found(index, place)

    def _probe_ends(self) -> tuple[str, str]:
        """What closes an answer in the middle of a conversation, and what closes the last one."""
        place, turns = "a probe conversation", [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": PROBE}]
        last = self._run(turns, place, None)[0].partition(PROBE)[2]
        try:
            middle = self._run([*turns, turns[0]], place, None)[0].partition(PROBE)[2]
        except InputError:  # a template for single turns only
            middle = last
        return self._to_last_token(last[: _shared(last, middle)]), self._to_last_token(last)

    def _to_last_token(self, end: str) -> str:
        """Cut what follows the last added token (`<|im_end|>`, `</s>`); without one, what follows the last line end."""
        tokens = [end.rfind(token) + len(token) for token in self._added if token in end]
        return end[: max(tokens)] if tokens else end[: end.rfind("\n") + 1]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], place: str, **options: Any) -> str:
    """Return a conversation's text; `options` are variables of the template (`add_generation_prompt`, `tools`, ...).

    Raises:
        InputError: the template fails on it, or is stopped by a limit.
    """
    program = sandbox.compile_template(tokenizer.chat_template)
    return _run(program, _name(tokenizer), tokenizer.special_tokens_map, messages, place, **options)[0]


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
    turns = [i for i, m in enumerate(messages) if m["role"] in template.train_on and UNTRAINED not in m]
    for index in turns[-1:] if template.last_only else turns:
        if messages[index]["role"] != ASSISTANT:
            continue
        prompt = tokenizer(template.prompt(messages[:index], place, tools), add_special_tokens=False)["input_ids"]
        same = _shared(encoding.ids, prompt)
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


def _run(program: jinja2.Template, name: str, special: dict, messages: list[dict], place: str, **options: Any):
    """The text and the marks, if their place is known. Failures name the row."""
    values = {**special, "tools": None, "documents": None, "add_generation_prompt": False, **options}
    values["messages"] = [_message(message) for message in messages]
    if values["tools"] is not None:
        values["tools"] = _plain(values["tools"])
    try:
        return sandbox.run(program, values)
    except Refused as error:
        rule = f"{name} was stopped on this row: {error}"
        raise InputError(place, rule, "Mend the row, or give another model.chat_template") from None
    except Exception as error:  # noqa: BLE001  a template is a program and can raise anything
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        rule = f"the chat template fails on this row: {said[:ERROR_CHARS]}"
        remedy = "Mend the row, or give another model.chat_template"
        if any(message.get("role") == "system" for message in messages):
            remedy = f"Where it knows no system role, data.system_turn=merge. Else {remedy[0].lower()}{remedy[1:]}"
        raise InputError(place, rule, remedy) from None


def _message(message: dict) -> dict:
    """A message as transformers hands it on: without None, its reasoning under both names, plain data only."""
    if len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str:
        return message
    message = {key: _plain(value) for key, value in message.items() if value is not None and key != UNTRAINED}
    thought = next((message[name] for name in _THOUGHTS if name in message), None)
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


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"


def _not_found(index: int, place: str) -> InputError:
    rule = f"the template renders turn {index} differently inside a conversation, so its tokens cannot be found"
    return InputError(place, rule, "Give model.chat_template=<file> with {% generation %} marks around answers")


def _shared(a: Sequence, b: Sequence) -> int:
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
