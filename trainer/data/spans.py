"""Which text of a conversation is trained, turn by turn: what the model writes when it is asked in that place.

The answer of a turn is what the template writes of the conversation up to and with it, after the prompt that inference feeds for
it (`add_generation_prompt`), to the end of the token that closes the turn; of a template with `{% generation %}` marks, what is
marked of that. A conversation is one row as far as its answers stand in its text word for word. Some families write an answer
otherwise once another turn follows (they strip thoughts, or add empty ones to the last): such an answer becomes a row of its own,
which ends with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from tritune.trainer.data.beginnings import PROBE, Beginnings
from tritune.trainer.data.templates import Program, block_names
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

ASSISTANT = "assistant"
FEW = 100  # characters that the longest marks of an empty answer have
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Rendered:
    """A text to train on.

    Attributes:
        spans: which characters are trained: `[start, stop)`, in order, disjoint.
        turns: by the number of each message that is trained in it, from where on the model writes it, and to where.
        upto: how many messages it holds.
    """

    text: str
    spans: Spans
    turns: dict[int, tuple[int, int]]
    upto: int


@dataclass(frozen=True)
class _Place:
    """Where in a text a turn begins after its prompt, and what of it is trained."""

    start: int
    spans: Spans


@dataclass(frozen=True)
class _Answer:
    """Turns as they are written when nothing follows them: one, or several that the template writes as one."""

    text: str
    start: int
    spans: Spans
    turns: range


class ChatTemplate:
    """Conversations -> texts, and the spans in them that are trained.

    Turns of roles other than the assistant's are trained from their content (not their header) to the end of the token that
    closes them, where there is one.

    Args:
        train_on: roles whose turns are trained.
        last_only: of these turns only the last.
        each: every trained turn is a row of its own, which ends with it.

    Raises:
        InputError: there is no template, or it is not valid.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: Sequence[str] = (ASSISTANT,), last_only: bool = False,
        each: bool = False,
    ) -> None:  # fmt: skip
        self.train_on, self.last_only, self.each = frozenset(train_on), last_only, each
        self.program = Program(tokenizer)
        self.has_marks = "generation" in block_names(self.program.source)
        self._added = [token for token in tokenizer.get_added_vocab() if token]
        self._header, self._tail, self._close, self._middle_close, frame = self._probe()
        self.frame = [token for token in self._added if token in frame]  # what opens and closes turns

    def trained(self, messages: Sequence[dict]) -> list[int]:
        """The numbers of the messages that are to be trained."""
        turns = [i for i, m in enumerate(messages) if m["role"] in self.train_on and UNTRAINED not in m]
        return turns[-1:] if self.last_only else turns

    def rows(self, messages: list[dict], place: str, tools: list | None = None) -> list[Rendered]:
        """Return the texts to train on, each with its own BOS, in the order of the turns in which they end.

        A conversation of one turn is rendered twice; else twice more for each trained turn.

        Raises:
            InputError: the template fails, is stopped by a limit, or asks for a turn otherwise than it writes it.
        """
        left = self.trained(messages)
        if left == [len(messages) - 1] and (row := self._last_alone(messages, place, tools)) is not None:
            return [row]
        beginnings = Beginnings(self.program, messages, place, tools)
        if not left:
            return [Rendered(beginnings.text(len(messages)), [], {}, len(messages))]
        rows: list[Rendered] = []
        upto = left[-1] + 1 if self.each else len(messages)
        while left:
            found = self._fill(beginnings, left, upto)
            if left[-1] not in found:
                if upto == left[-1] + 1:
                    raise self._otherwise(beginnings, left[-1])
                upto = left[-1] + 1
                continue
            spans = sorted({span for place in found.values() for span in place.spans})
            regions = {n: (p.start, p.spans[-1][1] if p.spans else p.start) for n, p in sorted(found.items())}
            rows.append(Rendered(beginnings.text(upto), spans, regions, upto))
            left = [turn for turn in left if turn not in found]
            upto = left[-1] + 1 if left else 0
        return rows[::-1]

    def _last_alone(self, messages: list[dict], place: str, tools: list | None) -> Rendered | None:
        """The row of a conversation that ends with its only trained answer, as most do: without the others' costs."""
        if messages[-1]["role"] != ASSISTANT or not (self._tail or self.has_marks):
            return None
        text, marks = self.program.run(messages, place, tools)
        try:
            asked = self.prompt(messages[:-1], place, tools)
        except InputError:
            return None
        start = len(asked)
        if not text.startswith(asked) or (marks is None if self.has_marks else not text.endswith(self._tail or "")):
            return None
        if self.has_marks:
            spans = [(max(a, start), b) for a, b in marks or [] if b > start]
        else:
            spans = [(start, len(text) - len(self._tail or "") + len(self._close))]
        stop = spans[-1][1] if spans else start
        return Rendered(text, spans, {len(messages) - 1: (start, stop)}, len(messages)) if start <= stop else None

    def prompt(self, messages: list[dict], place: str, tools: list | None = None) -> str:
        """Return the text up to where the assistant begins to speak.

        Raises:
            InputError: the template fails, or is stopped by a limit.
        """
        return self.program.run(messages, place, tools, add_generation_prompt=True)[0]

    def _fill(self, beginnings: Beginnings, turns: list[int], upto: int) -> dict[int, _Place]:
        """By turn, where those are that are written in this text as they are when they are asked for.

        From the last on: a turn whose spans would reach into a later one's is not there.
        """
        found: dict[int, _Place] = {}
        bound = len(beginnings.text(upto))
        for turn in reversed(turns):
            if turn >= upto or turn in found or (found and self.each):
                continue
            find = self._answer if beginnings.messages[turn]["role"] == ASSISTANT else self._other
            placed = find(beginnings, turn, upto)
            if untrained := [n for n in placed if UNTRAINED in beginnings.messages[n]]:
                rule = f"the template writes turns {untrained[0]} and {turn} as one, and the row flags one as not to be learnt"
                raise InputError(
                    beginnings.place, rule, "Flag both alike, or give a model.chat_template=<file> that parts them"
                )
            for number, place in placed.items():
                if number in turns and (not place.spans or place.spans[-1][1] <= bound):
                    found[number] = place
            bound = min((place.start for place in found.values()), default=bound)
        return found

    # -- answers

    def _answer(self, beginnings: Beginnings, turn: int, upto: int) -> dict[int, _Place]:
        text = beginnings.text(upto)
        answer = self._alone(beginnings, turn) if turn + 1 == upto or beginnings.can(turn + 1) else None
        if answer is None:
            place, turns = self._within(beginnings, turn, upto), range(turn, turn + 1)
        else:
            spans, turns = self._placed(answer, text), answer.turns
            place = None if spans is None else _Place(answer.start, spans)
        return {} if place is None else dict.fromkeys(turns, place)

    def _alone(self, beginnings: Beginnings, turn: int) -> _Answer | None:
        """The answer where nothing follows it."""
        text = beginnings.text(turn + 1)
        start, first = self._start(beginnings, turn, text)
        if start < 0:
            return _Answer(text, start, [], range(0))
        if self.has_marks:
            marks = beginnings.marks(turn + 1)
            spans = [(max(a, start), b) for a, b in marks if b > start]
            return _Answer(text, start, spans, range(first, turn + 1))
        written = text[start:]
        if self._tail is not None and written.endswith(self._tail):
            stop = len(text) - len(self._tail) + len(self._close)
        else:  # calls of tools are closed otherwise
            stop = start + (len(self._to_last_token(written)) or len(written))
        return _Answer(text, start, [(start, stop)], range(first, turn + 1))

    def _start(self, beginnings: Beginnings, turn: int, text: str) -> tuple[int, int]:
        """Where the prompt for a turn ends in `text`, and the first of the turns that are answered there.

        -1 where the text does not begin with the prompt. Nobody asks for a turn that no other stands before, or one of the
        assistant's own: then it begins after its header, and where it has none it is one with the turn before.
        """
        asked = beginnings.prompt(turn)
        if asked is not None and text.startswith(asked):
            return len(asked), turn
        first, messages = turn, beginnings.messages
        while first and messages[first - 1]["role"] == ASSISTANT:
            first -= 1
        before = 0
        if first < turn:
            asked = beginnings.prompt(first)
            before = (
                len(asked) if asked is not None and text.startswith(asked) else self._start(beginnings, first, text)[0]
            )
        elif asked is not None and turn:
            return -1, turn
        head = self._head(beginnings, turn)
        if head is None or not text.startswith(head):
            return (before, first) if first < turn else (-1, turn)
        header = head.rfind(self._header, before) if self._header else -1
        if header >= 0:
            return header + len(self._header), turn
        return (before, first) if first < turn else (len(head), turn)

    def _placed(self, answer: _Answer, text: str) -> Spans | None:
        """An answer's spans in a longer text; None where it is not written there as it is."""
        if not answer.turns:
            return None
        if text is answer.text or not answer.spans:
            return answer.spans
        start, stop = answer.spans[-1]
        if text.startswith(answer.text[:stop]):
            return answer.spans
        if self._middle_close and answer.text.endswith(self._close, start, stop):
            body = answer.text[: stop - len(self._close)]
            if text.startswith(body + self._middle_close):
                return [*answer.spans[:-1], (start, len(body) + len(self._middle_close))]
        return None

    def _within(self, beginnings: Beginnings, turn: int, upto: int) -> _Place | None:
        """An answer's place where the template refuses a conversation that ends with it: found by its content."""
        text, content = beginnings.text(upto), beginnings.messages[turn].get("content")
        start, _ = self._start(beginnings, turn, text)
        probed = beginnings.probed(turn, upto)
        head, found, rest = (probed or "").partition(PROBE)
        if start < 0 or not found or not isinstance(content, str) or not text.endswith(rest):
            return None
        stop = len(text) - len(rest)
        if not len(head) <= stop or text[len(head) : stop].strip() != content.strip():
            return None
        close = next((c for c in (self._close, self._middle_close) if c and rest.startswith(c)), "")
        spans = [(start, stop + len(close))]
        if not self.has_marks:
            return _Place(start, spans)
        stop = spans[0][1]
        marks = [(max(a, start), min(b, stop)) for a, b in beginnings.marks(upto) if b > start and a < stop]
        return _Place(start, marks)

    # -- turns of other roles

    def _other(self, beginnings: Beginnings, turn: int, upto: int) -> dict[int, _Place]:
        text, content = beginnings.text(upto), beginnings.messages[turn].get("content")
        head, found, tail = (beginnings.probed(turn, turn + 1) or "").partition(PROBE)
        if not found or not isinstance(content, str) or not text.startswith(head):
            return {}
        start = len(head)
        for written in (content, content.strip()):  # some templates trim
            if text.startswith(written, start):
                stop = start + len(written)
                same = shared(tail, text[stop : stop + len(tail)])
                return {turn: _Place(start, [(start, stop + len(self._to_last_token(tail[:same])))])}
        return {}

    # -- what the template writes around any answer

    def _head(self, beginnings: Beginnings, turn: int) -> str | None:
        """What stands before the content of a turn."""
        probed = beginnings.probed(turn, turn + 1) or beginnings.probed(turn, len(beginnings.messages))
        head, found, _ = (probed or "").partition(PROBE)
        return head if found else None

    def _probe(self) -> tuple[str, str | None, str, str, str]:
        """The header of an answer, all that follows a last answer, what closes it, what closes one in the middle, and a turn.

        Empty where a template refuses our conversations: that is no fault of a row's.
        """
        for first in ([], [{"role": "system", "content": "a"}]):
            user = [*first, {"role": "user", "content": "a"}]
            beginnings = Beginnings(
                self.program, [*user, {"role": ASSISTANT, "content": PROBE}, user[-1]], "a probe", None
            )
            if beginnings.can(len(user) + 1):
                break
        else:
            return "", None, "", "", ""
        asked = beginnings.prompt(len(user)) or ""
        plain = beginnings.text(len(user)) if beginnings.can(len(user)) else asked
        header = asked[shared(asked, plain) :]
        last = beginnings.text(len(user) + 1).partition(PROBE)[2]
        middle = last  # of a template for single turns only
        if beginnings.can(len(user) + 2):
            middle = beginnings.text(len(user) + 2).partition(PROBE)[2]
        close, middle_close = self._to_last_token(last), self._to_last_token(last[: shared(last, middle)])
        if not middle_close.strip():  # what ends an answer is not written in the middle
            middle_close = ""
        return header, last, close, middle_close, plain + asked + close + middle_close

    def says_nothing(self, row: Rendered) -> bool:
        """Whether an answer that is trained in a row is nothing but what closes it, and thoughts without a word."""
        return any(self._is_empty(row.text[start:stop]) for start, stop in row.turns.values() if stop - start <= FEW)

    def _is_empty(self, written: str) -> bool:
        for token in (self._close.strip(), *self._added):
            written = written.replace(token, " ") if token else written
        return not re.sub(r"</?think(ing)?>", " ", written).strip()

    def _to_last_token(self, end: str) -> str:
        """Cut what follows the last added token (`<|im_end|>`, `</s>`); without one, what follows the last line end."""
        tokens = [end.rfind(token) + len(token) for token in self._added if token in end]
        return end[: max(tokens)] if tokens else end[: end.rfind("\n") + 1]

    def _otherwise(self, beginnings: Beginnings, turn: int) -> InputError:
        role = beginnings.messages[turn]["role"]
        rule = f"the template writes turn {turn} ({role}) otherwise than it is asked for, so its tokens cannot be found"
        asked = beginnings.prompt(turn) if role == ASSISTANT else None
        if asked is not None:
            same = shared(asked, beginnings.text(turn + 1))
            there, here = (bounded(t[max(same - 20, 0) : same + 20], 40) for t in (asked, beginnings.text(turn + 1)))
            rule += f": asked, it has {there!r}, and with the answer {here!r}"
        remedy = "Give model.chat_template=chatml, or a <file> that writes answers after its prompt"
        if any(message["role"] == "system" for message in beginnings.messages):  # some write it into the last question
            remedy = f"Try data.system_turn=merge. Else g{remedy[1:]}"
        return InputError(beginnings.place, rule, remedy)


def shared(a: Sequence, b: Sequence) -> int:
    """How long their common beginning is."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
