"""Records -> tokens and the spans that are trained, many at a time: one encoder for each kind of objective."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ClassifyTokenConfig, ObjectiveConfig
from tritune.trainer.config_choices import Overlong, Turns
from tritune.trainer.config_data import DataConfig
from tritune.trainer.data.examples import Columns
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.masks import token_spans
from tritune.trainer.data.remarks import Kind, Remark
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.unrendered import unrendered
from tritune.trainer.errors import InputError
from tritune.trainer.tokenizer import adds_bos


@dataclass
class Encoded:
    """What became of some records.

    Attributes:
        columns: the rows that can be trained on; `stops` and `points` are one a row: whether a stop token is trained, and where
            the row lies when its source is divided.
        token_bytes: one array a row: how many bytes of the text each token is the first to reach the end of; text only.
        bad: faults of rows that are left out. dropped: places of rows without a supervised token, with why.
        too_long: places of rows left out above `data.max_length`.
        remarks: what is said of rows in `columns`, which number them.
    """

    columns: Columns = field(default_factory=Columns)
    stops: list[bool] = field(default_factory=list)
    points: list[float] = field(default_factory=list)
    token_bytes: list[np.ndarray] = field(default_factory=list)
    bad: list[InputError] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def fits(self, length: int, place: str, data: DataConfig) -> bool:
        """Whether a row is kept, cut or not; notes it otherwise.

        Raises:
            InputError: it is too long, and the config refuses such rows.
        """
        if length <= data.max_length or data.overlong is Overlong.cut:
            return True
        if data.overlong is Overlong.refuse:
            rule = f"the row has {length:,} tokens, and data.max_length={data.max_length}"
            raise InputError(place, rule, "Raise it, shorten the row, or data.overlong=cut|drop")
        self.too_long.append(place)
        return False


class Encoder(Protocol):
    """Encodes a list of records. Forked processes inherit it."""

    def __call__(self, records: Sequence[Record]) -> Encoded: ...


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

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out = Encoded()
        if self.template is None and any(r.messages is not None for r in records):
            ChatTemplate(self.tokenizer)  # says that there is none
        rows = self._plain(records) if self.template is None else self._rendered(records, self.template, out)
        for record, ids, spans, part, said in rows:
            self._add(out, record, ids, spans, part, said)
        return out

    def _rendered(self, records: Sequence[Record], template: ChatTemplate, out: Encoded):
        rendered, kept = [], []
        for record in records:
            messages = record.messages
            if messages is None:
                messages = [
                    {"role": "user", "content": record.prompt or ""},
                    {"role": "assistant", "content": record.response or ""},
                ]
            try:
                rows = template.rows(messages, record.place, record.tools)
            except InputError as error:
                out.bad.append(error)
                continue
            missing = unrendered(messages, record.tools, rows)
            for number, row in enumerate(rows):
                last = number + 1 == len(rows)
                said: list[tuple[Kind, dict[str, int]]] = []
                said += [(Kind.apart, {"conversations": int(last)})] if len(rows) > 1 else []
                said += [(Kind.unrendered, missing)] if missing and last else []
                said += [(Kind.empty, {})] if template.says_nothing(row) else []
                kept.append((record, number if len(rows) > 1 and not last else None, said))
            rendered += rows
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        for (record, part, said), one, encoding in zip(kept, rendered, encodings, strict=True):
            yield record, encoding.ids, token_spans(encoding, one), part, said

    def _plain(self, records: Sequence[Record]):
        # As one text with BOS written out: what `prompts.plain_template` renders when the model is asked.
        prompts = [f"{self.begin}{r.prompt or ''}\n" for r in records]
        responses = [r.response or "" for r in records]
        encoded = self.backend.encode_batch(prompts + responses, add_special_tokens=False)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        for i, record in enumerate(records):
            prompt, response = encoded[i].ids, encoded[len(records) + i].ids if responses[i] else []
            ids = [*prompt, *response, *(end if response else [])]
            said: list[tuple[Kind, dict[str, int]]] = [] if responses[i].strip() else [(Kind.empty, {})]
            yield record, ids, [(len(prompt), len(ids))] if response else [], None, said

    def _add(
        self, out: Encoded, record: Record, ids: list[int], spans: Sequence[tuple[int, int]], part: int | None,
        said: Sequence[tuple[Kind, dict[str, int]]],
    ) -> None:  # fmt: skip
        """Add a row; `part` is its number among those that a record became, None for the last or only one."""
        limit = self.data.max_length
        if not out.fits(len(ids), record.place, self.data):
            return
        kept = [(max(a, 1), min(b, limit)) for a, b in spans]  # the first token of a row is never predicted
        kept = [(a, b) for a, b in kept if a < b]
        if not kept:
            beyond = any(b > 1 for _, b in spans)
            out.dropped.append(record.place + (" (its answer lies beyond the cut)" if beyond else ""))
            return
        digest = record.digest()
        own = digest if part is None else hashlib.sha256(digest + b"%d" % part).digest()
        out.remarks += [Remark(len(out.columns), kind, parts) for kind, parts in said]
        out.columns.add(ids[:limit], kept, record.place, full_length=len(ids), digest=own[:16])
        out.stops.append(any(not self.stops.isdisjoint(ids[a:b]) for a, b in kept))
        out.points.append(record.point(digest))


class Labelled:
    """Text and label: the text's tokens, cut where the row is too long, and what the objective's prompt puts around it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, objective: ObjectiveConfig) -> None:
        self.data, self.backend = data, plain_backend(tokenizer)
        prompt = objective.prompt if isinstance(objective, ClassifyTokenConfig) else "{text}"
        self.head, _, tail = prompt.partition("{text}")
        self.tail = self.backend.encode(tail, add_special_tokens=False).ids if tail else []
        # What follows the text must follow its words, not an end-of-text token that some tokenizers put there.
        self.begin = [tokenizer.bos_token_id] if tail and adds_bos(tokenizer) else []
        if data.max_length <= len(self.tail):
            remedy = "Raise data.max_length or shorten objective.prompt"
            raise InputError(f"data.max_length={data.max_length}", "the prompt leaves no room for the text", remedy)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out, texts = Encoded(), [self.head + (r.text or "") for r in records]
        encoded = self.backend.encode_batch(texts, add_special_tokens=not self.tail)
        room = self.data.max_length - len(self.tail)  # the text is cut, never what follows it
        for record, encoding in zip(records, encoded, strict=True):
            if not (record.text or "").strip():
                out.bad.append(InputError(record.place, "the text is empty", "Remove the row"))
                continue
            ids = self.begin + encoding.ids
            full = len(ids) + len(self.tail)
            if not out.fits(full, record.place, self.data):
                continue
            digest = record.digest()
            row = ids[:room] + self.tail
            if not row:
                out.bad.append(InputError(record.place, "the tokenizer makes nothing of the text", "Remove the row"))
                continue
            out.columns.add(row, [], record.place, label=record.label, full_length=full, digest=digest[:16])
            out.stops.append(False)
            out.points.append(record.point(digest))
        return out


class Documents:
    """Plain text, a document a row, whole; every token but the first is predicted.

    Args:
        separate: close each document with the end-of-text token where the tokenizer does not begin one with BOS: what keeps
            documents apart that are joined later.
        limit: cut documents here, and leave out those without a token to predict; None keeps them whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separate: bool, limit: int | None = None) -> None:
        self.backend, self.limit = plain_backend(tokenizer), limit
        ends = separate and not adds_bos(tokenizer) and tokenizer.eos_token_id is not None
        self.end = [tokenizer.eos_token_id] if ends else []

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out, texts = Encoded(), [r.text or "" for r in records]
        for record, text, encoding in zip(
            records, texts, self.backend.encode_batch(texts, add_special_tokens=True), strict=True
        ):
            ids = np.array(encoding.ids + self.end, np.int32)
            num_bytes = _reached(text, encoding.offsets, len(self.end))
            full, digest = len(ids), record.digest()
            if self.limit is not None:
                ids, num_bytes = ids[: self.limit], num_bytes[: self.limit]
                if len(ids) < 2:
                    out.dropped.append(record.place)
                    continue
            spans = [(1, len(ids))] if len(ids) > 1 else []
            spelled = int(num_bytes[1:].sum())
            out.columns.add(ids, spans, record.place, num_bytes=spelled, full_length=full, digest=digest[:16])
            out.stops.append(False)
            out.points.append(record.point(digest))
            out.token_bytes.append(num_bytes)
        return out


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


def plain_backend(tokenizer: PreTrainedTokenizerBase):
    """The tokenizer's Rust half, neither cutting nor padding."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.no_truncation()
    backend.no_padding()
    return backend
