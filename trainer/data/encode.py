"""Records -> tokens and the spans that are trained, many at a time: one encoder for each kind of objective."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.choices import Overlong, SpecialTokens, Turns
from tritune.trainer.config.data import ROLES, DataConfig
from tritune.trainer.data.confined_rows import ConfinedRows
from tritune.trainer.data.control import ControlTokens
from tritune.trainer.data.cutting import (
    Content,
    Run,
    asked_contents,
    content_within,
    runs_to_cut,
    tokens_until,
    without,
)
from tritune.trainer.data.encoded import BEYOND, Encoded
from tritune.trainer.data.kinds import Record, turns_of
from tritune.trainer.data.label_prompt import label_prompt
from tritune.trainer.data.masks import token_spans
from tritune.trainer.data.remarks import Kind, Remark
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.tokenizing import plain_backend
from tritune.trainer.data.unrendered import unrendered
from tritune.trainer.data.unspelt import Said, Unspelt
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import adds_bos

Asked = Callable[[], list[list[Content]]]  # what may be cut of a row; only looked for where it is too long


@dataclass(frozen=True)
class _Asked:
    """What a template is asked to render: a record's conversation, whose control tokens may be hidden."""

    record: Record
    messages: list[dict]
    tools: list | None
    control: dict[str, int]
    hidden: bool


class Conversations:
    """Messages, or prompt and response, with the loss on the responses.

    A tokenizer with a chat template renders both; without one, prompt and response are joined by a line end and closed
    with the end-of-text token, and messages are refused.

    Args:
        stops: ids that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, stops: Sequence[int]) -> None:
        self.tokenizer, self.data, self.stops = tokenizer, data, frozenset(stops)
        self.backend = plain_backend(tokenizer)
        self.begin = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        self.template = None
        if tokenizer.chat_template:
            self.template = chat_template(tokenizer, data)
            self.render_all = ConfinedRows(self.template)
        frame = self.template.frame if self.template is not None else ()
        self.words = " ".join((self.template.program.source if self.template is not None else "", *ROLES))
        self.control = ControlTokens(tokenizer, frame, data.special_tokens is SpecialTokens.keep)
        self.unspelt = Unspelt(tokenizer)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out = Encoded()
        if self.template is None and any(r.messages is not None for r in records):
            ChatTemplate(self.tokenizer)  # says that there is none
        rows = self._plain(records, out) if self.template is None else self._rendered(records, self.template, out)
        for record, ids, spans, part, said, asked in rows:
            if (row := self._fitted(out, record, ids, spans, asked)) is not None:
                self._add(out, record, len(ids), row, spans, part, said)
        return out

    def _rendered(self, records: Sequence[Record], template: ChatTemplate, out: Encoded):
        asked: list[_Asked] = []
        for record in records:
            try:
                asked.append(self._asked(record))
            except InputError as error:
                out.bad.append(error)
        rendered, kept = [], []
        answers = self.render_all([(one.messages, one.record.place, one.tools) for one in asked])
        for one, rows in zip(asked, answers, strict=True):
            record, place = one.record, one.record.place
            try:
                if isinstance(rows, InputError):
                    raise rows
                texts = [self.control.unmask(row.text, place) if one.hidden else row.text for row in rows]
            except InputError as error:
                out.bad.append(error)
                continue
            missing = unrendered(one.messages, one.tools, rows)
            for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
                last = number + 1 == len(rows)
                said: Said = [(Kind.apart, {"conversations": int(last)})] if len(rows) > 1 else []
                said += [(Kind.unrendered, missing)] if missing and last else []
                said += [(Kind.control, one.control)] if one.control and last else []
                said += [(Kind.empty, {})] if template.says_nothing(row) else []
                shown = replace(row, text=text) if one.hidden else row
                kept.append((record, None if last else number, said, one.hidden, shown))
                rendered.append(row.text)
        places = [record.place for record, *_ in kept]
        encoded = self.control.encode(rendered, [hidden for *_, hidden, _ in kept], places, specials=False)
        for (record, part, said, _, row), (ids, encoding) in zip(kept, encoded, strict=True):
            spans = token_spans(encoding, row)
            said = said + self.unspelt.said(ids, row.text, encoding, spans)
            yield record, ids, spans, part, said, partial(asked_contents, row, turns_of(record), self.words, encoding)

    def _asked(self, record: Record) -> _Asked:
        messages, tools = turns_of(record), record.tools
        control = self.control.found_in_turns(messages, tools)
        hidden = bool(control) and not self.control.keep
        if hidden:
            messages, tools = self.control.mask(messages, record.place), self.control.mask(tools, record.place)
        return _Asked(record, messages, tools, control, hidden)

    def _plain(self, records: Sequence[Record], out: Encoded):
        # As one text with BOS written out: what `prompts.plain_template` renders when the model is asked.
        kept, prompts, answers = [], [], []
        for record in records:
            found = self.control.found(record.prompt, record.response)
            hidden = bool(found) and not self.control.keep
            pair = (record.prompt or "", record.response or "")
            try:
                prompt, response = self.control.mask(pair, record.place) if hidden else pair
            except InputError as error:
                out.bad.append(error)
                continue
            said: Said = [(Kind.control, found)] if found else []
            kept.append((record, hidden, said + ([] if response.strip() else [(Kind.empty, {})])))
            prompts.append(f"{self.begin}{prompt}\n")
            answers.append(response)
        hidden_ones, places = [hidden for _, hidden, _ in kept] * 2, [record.place for record, *_ in kept] * 2
        encoded = list(self.control.encode(prompts + answers, hidden_ones, places, specials=False))
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        for i, (record, _, said) in enumerate(kept):
            (before, asked), (answer, answered) = encoded[i], encoded[len(kept) + i]
            said += self.unspelt.said(before, self.begin + (record.prompt or ""), asked)
            said += self.unspelt.said(answer, record.response or "", answered, [(0, len(answer))])
            ids = [*before, *answer, *(end if answer else [])]
            asked_of = partial(_prompt, asked, len(self.begin), len(record.prompt or ""))
            yield record, ids, [(len(before), len(ids))] if answer else [], None, said, asked_of

    def _fitted(
        self, out: Encoded, record: Record, ids: list[int], spans: Sequence[Run], asked: Asked
    ) -> tuple[list[int], list[Run]] | None:
        """A row's tokens and spans within `data.max_length`; None, noted, where it is left out for its length."""
        if not out.fits(len(ids), record.place, self.data):
            return None
        limit, row, moved = self.data.max_length, ids, list(spans)
        excess = (
            max((b for _, b in spans), default=0) - limit
        )  # what follows the last answer trains nothing, and goes first
        if excess > 0 and self.data.overlong is not Overlong.cut:
            runs = runs_to_cut(asked(), excess, self.data.overlong is Overlong.cut_prompt_middle)
            row, moved = without(ids, spans, runs or [])
        kept = [(max(a, 1), min(b, limit)) for a, b in moved]  # the first token of a row is never predicted
        return row[:limit], [(a, b) for a, b in kept if a < b]

    def _add(
        self, out: Encoded, record: Record, full: int, row: tuple[list[int], list[Run]], spans: Sequence[Run],
        part: int | None, said: Said,
    ) -> None:  # fmt: skip
        """Add a row; `part` is its number among those that a record became, None for the last or only one.

        Args:
            full, spans: how long it was before it was cut, and its spans then.
        """
        ids, kept = row
        if not kept:
            beyond = any(b > 1 for _, b in spans)
            out.dropped.append(record.place + (BEYOND if beyond else ""))
            return
        lost = sum(b - max(a, 1) for a, b in spans if b > 1) - sum(b - a for a, b in kept)
        said = said + ([(Kind.truncated_answers, {"tokens": lost})] if lost else [])
        digest = record.digest()
        own = digest if part is None else hashlib.sha256(digest + b"%d" % part).digest()
        out.remarks += [Remark(len(out.columns), kind, parts) for kind, parts in said]
        out.columns.add(ids, kept, record.place, full_length=full, digest=own[:16])
        out.stops.append(any(not self.stops.isdisjoint(ids[a:b]) for a, b in kept))
        out.points.append(record.point(digest))


class Labelled:
    """Text and label: the text's tokens, cut where the row is too long, and what the objective's prompt puts around it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, objective: ObjectiveConfig) -> None:
        self.data, self.backend = data, plain_backend(tokenizer)
        self.control = ControlTokens(tokenizer, keep=data.special_tokens is SpecialTokens.keep)
        self.unspelt = Unspelt(tokenizer)
        self.prompt = label_prompt(tokenizer, objective)
        if data.max_length <= len(self.backend.encode(self.prompt.tail, add_special_tokens=False).ids):
            remedy = "Raise data.max_length or shorten objective.prompt"
            raise InputError(f"data.max_length={data.max_length}", "the prompt leaves no room for the text", remedy)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out, prompt = Encoded(), self.prompt
        encoded = encode_texts(self.control, self.unspelt, records, out, prompt.specials, prompt.head, prompt.tail)
        for record, said, ids, encoding in encoded:
            if not (record.text or "").strip():
                out.bad.append(InputError(record.place, "the text is empty", "Remove the row"))
                continue
            full = len(prompt.begin) + len(ids)
            if not out.fits(full, record.place, self.data):
                continue
            digest = record.digest()
            row = prompt.begin + ids if full <= self.data.max_length else self._cut(ids, encoding, record.text or "")
            if not row:
                out.bad.append(InputError(record.place, "the tokenizer makes nothing of the text", "Remove the row"))
                continue
            out.remarks += [Remark(len(out.columns), kind, parts) for kind, parts in said]
            out.columns.add(row, [], record.place, label=record.label, full_length=full, digest=digest[:16])
            out.stops.append(False)
            out.points.append(record.point(digest))
        return out

    def _cut(self, ids: list[int], encoding: Encoding, text: str) -> list[int]:
        """The text is cut where `data.overlong` says, never what follows it."""
        begin, most, start = self.prompt.begin, self.data.max_length, len(self.prompt.head)
        end = start + len(text)
        kept = ids
        if self.data.overlong is not Overlong.cut:
            middle = self.data.overlong is Overlong.cut_prompt_middle
            runs = runs_to_cut(_prompt(encoding, start, len(text)), len(begin) + len(ids) - most, middle)
            kept = without(ids, [], runs or [])[0]
        after = tokens_until(encoding, end) - (len(ids) - len(kept))
        room = max(most - (len(kept) - after), 0)
        return ((begin + kept[:after])[:room] + kept[after:])[-most:]


class Documents:
    """Plain text, a document a row, whole; every token but the first is predicted.

    Args:
        separate: close each document with the end-of-text token where the tokenizer does not begin one with BOS: what keeps
            documents apart that are joined later.
        keep: take control tokens in the texts for what they are.
        limit: cut documents here, and leave out those without a token to predict; None keeps them whole.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, separate: bool, limit: int | None = None, keep: bool = False
    ) -> None:
        self.backend, self.limit = plain_backend(tokenizer), limit
        self.control, self.unspelt = ControlTokens(tokenizer, keep=keep), Unspelt(tokenizer)
        ends = separate and not adds_bos(tokenizer) and tokenizer.eos_token_id is not None
        self.end = [tokenizer.eos_token_id] if ends else []

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out = Encoded()
        encoded = encode_texts(self.control, self.unspelt, records, out, specials=True)
        for record, said, tokens, encoding in encoded:
            ids = np.array(tokens + self.end, np.int32)
            num_bytes = self.unspelt.spelt(ids, _reached(record.text or "", encoding.offsets, len(self.end)))
            full, digest = len(ids), record.digest()
            if self.limit is not None:
                ids, num_bytes = ids[: self.limit], num_bytes[: self.limit]
                if len(ids) < 2:
                    out.dropped.append(record.place)
                    continue
            spans = [(1, len(ids))] if len(ids) > 1 else []
            spelled = int(num_bytes[1:].sum())
            out.remarks += [Remark(len(out.columns), kind, parts) for kind, parts in said]
            out.columns.add(ids, spans, record.place, num_bytes=spelled, full_length=full, digest=digest[:16])
            out.stops.append(False)
            out.points.append(record.point(digest))
            if record.whole not in (None, record.place):
                out.wholes[record.place] = str(record.whole)
            out.token_bytes.append(num_bytes)
        return out


def encode_texts(
    control: ControlTokens, unspelt: Unspelt, records: Sequence[Record], out: Encoded, specials: bool,
    head: str = "", tail: str = "",
) -> Iterator[tuple[Record, Said, list[int], Encoding]]:  # fmt: skip
    """Yield records with what is said of their texts, and the tokens of `head`, text and `tail`; faults go to `out`."""
    kept, texts, hidden = [], [], []
    for record in records:
        text = record.text or ""
        found = control.found(text)
        try:
            texts.append(head + (control.mask(text, record.place) if found and not control.keep else text) + tail)
        except InputError as error:
            out.bad.append(error)
            continue
        kept.append((record, found))
        hidden.append(bool(found) and not control.keep)
    places = [record.place for record, _ in kept]
    for (record, found), (ids, encoding) in zip(kept, control.encode(texts, hidden, places, specials), strict=True):
        said: Said = [(Kind.control, found)] if found else []
        yield record, said + unspelt.said(ids, head + (record.text or "") + tail, encoding), ids, encoding


def _prompt(encoding: Encoding, start: int, length: int) -> list[list[Content]]:
    """A prompt's own tokens, as what is asked before the only answer: its characters begin at `start`."""
    content = content_within(encoding, start, start + length)
    return [[content]] if content.start < content.stop else []


def _reached(text: str, offsets: list[tuple[int, int]], extra: int) -> np.ndarray:
    """For each token, how many UTF-8 bytes of the text it is the first to reach the end of; 0 for `extra` ones after them."""
    ends = np.array([stop for _, stop in offsets], np.int64)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    reached = np.diff(np.maximum.accumulate(ends), prepend=0) if len(ends) else ends
    return np.concatenate([reached, np.zeros(extra, np.int64)]).astype(np.int32)


def chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ChatTemplate:
    """The tokenizer's template, for what the config trains.

    Raises:
        InputError: there is none, or it is not valid.
    """
    return ChatTemplate(tokenizer, data.train_on, data.last_turn_only, each=data.turns is Turns.each)
