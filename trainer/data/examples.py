"""Records -> token ids with a supervision mask, held in flat arrays; what was cut or dropped is counted and named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ClassifyTokenConfig, Config
from tritune.trainer.config_choices import Unsupervised
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.templates import ChatTemplate
from tritune.trainer.errors import InputError
from tritune.trainer.tokenizer import adds_bos, stop_token_ids

NAMED = 3  # how many places a message lists


@dataclass
class DataReport:
    """What became of a source: shown at the start and written to `data.json`."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped: list[str] = field(default_factory=list)  # places of rows without a supervised token
    stop_rows: int = 0  # rows in which a stop token is trained

    def line(self) -> str:
        share = self.supervised_tokens / max(self.tokens, 1)
        parts = [f"{self.rows:,} rows", f"{self.tokens:,} tokens"]
        if self.supervised_tokens:
            parts.append(f"{share:.0%} supervised")
        if self.truncated_rows:
            parts.append(f"{self.truncated_rows:,} rows cut by {self.truncated_tokens:,} tokens")
        if self.dropped:
            parts.append(f"{len(self.dropped):,} rows dropped without a supervised token: {_places(self.dropped)}")
        return ", ".join(parts)


class Examples:
    """Tokenized rows in flat arrays.

    Row i has ids `ids[starts[i]:starts[i + 1]]` (int32), `supervised` for each token, class `labels[i]` (-1: none) and
    `num_bytes[i]`, the UTF-8 length of what its predicted tokens spell (0 where not counted). `digest` is the SHA-256 of every
    token, mask and label: two equal ones train the same.
    """

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._supervised: list[np.ndarray] = []
        self._labels: list[int] = []
        self._num_bytes: list[int] = []
        self.places: list[str] = []
        self.report = DataReport()

    def add(
        self,
        ids: Sequence[int] | np.ndarray,
        supervised: Sequence[bool],
        place: str,
        label: int = -1,
        num_bytes: int = 0,
    ) -> None:
        self._ids.append(np.asarray(ids, dtype=np.int32))
        self._supervised.append(np.asarray(supervised, dtype=bool))
        self._labels.append(label)
        self._num_bytes.append(num_bytes)
        self.places.append(place)
        self.report.rows += 1
        self.report.tokens += len(ids)
        self.report.supervised_tokens += int(self._supervised[-1].sum())

    def freeze(self) -> Examples:
        """Concatenate; no row can be added after this."""
        self.lengths = np.array([len(x) for x in self._ids], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate(self._ids) if self._ids else np.zeros(0, np.int32)
        self.supervised = np.concatenate(self._supervised) if self._supervised else np.zeros(0, bool)
        self.labels = np.array(self._labels, dtype=np.int64)
        self.num_bytes = np.array(self._num_bytes, dtype=np.int64)
        digest = hashlib.sha256()
        for part in (self.ids, self.supervised, self.starts, self.labels):
            digest.update(part.data)
        self.digest = digest.hexdigest()
        del self._ids, self._supervised, self._labels, self._num_bytes
        return self

    def __len__(self) -> int:
        return len(self.places)


def conversations(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, config: Config, model_stops: Sequence[int] = ()
) -> Examples:
    """Messages, or prompt and response, with the loss on the responses.

    A tokenizer with a chat template renders both; without one, prompt and response are joined by a line end and closed
    with the end-of-text token, and messages are refused.

    Args:
        model_stops: ids that end an answer by the model's own generation config.
    """
    stops = set(stop_token_ids(tokenizer, list(model_stops)))
    begin = tokenizer.bos_token if adds_bos(tokenizer) else ""
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    examples = Examples()
    for record in records:
        messages, prompt_text, response_text = record.messages, record.prompt or "", record.response or ""
        if messages is None and template is not None:
            messages = [{"role": "user", "content": prompt_text}, {"role": "assistant", "content": response_text}]
        if messages is not None:
            ids, mask = (template or ChatTemplate(tokenizer)).encode(messages, record.place)
        else:
            # As one text with BOS written out: what `prompts.plain_template` renders when the model is asked.
            prompt = tokenizer(f"{begin}{prompt_text}\n", add_special_tokens=False)["input_ids"]
            response = tokenizer(response_text, add_special_tokens=False)["input_ids"] if response_text else []
            end = [tokenizer.eos_token_id] if response and tokenizer.eos_token_id is not None else []
            ids, mask = prompt + response + end, [False] * len(prompt) + [True] * (len(response) + len(end))
        _add_truncated(examples, ids, mask, record.place, stops, config)
    _require_supervision(examples, config)
    if config.data.require_stop_token and len(examples) and not examples.report.stop_rows:
        rule = "no stop token is trained in any row, so the model would not learn to end an answer"
        remedy = "Use a template whose answers end with one, or data.require_stop_token=false"
        raise InputError(f"stop tokens {tokenizer.convert_ids_to_tokens(sorted(stops))}", rule, remedy)
    return examples.freeze()


def labelled(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, config: Config, labels: list[str]
) -> Examples:
    """Text and label: the text's tokens, the label's index in `labels`."""
    examples, index = Examples(), {label: i for i, label in enumerate(labels)}
    prompt = config.objective.prompt if isinstance(config.objective, ClassifyTokenConfig) else "{text}"
    head, _, tail = prompt.partition("{text}")
    tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    rows = list(records)
    texts = [head + (r.text or "") for r in rows]
    # What follows the text must follow its words, not an end-of-text token that some tokenizers put there.
    begin = [tokenizer.bos_token_id] if tail and adds_bos(tokenizer) else []
    encoded = tokenizer(texts, add_special_tokens=not tail)["input_ids"] if texts else []
    for record, ids in zip(rows, encoded, strict=True):
        if record.label not in index:
            rule = f"the label {record.label!r} is not in the label set"
            remedy = (
                f"It has {', '.join(labels[:5])}{' ...' if len(labels) > 5 else ''}: mend the row, or give data.labels"
            )
            raise InputError(record.place, rule, remedy)
        if not (record.text or "").strip():
            raise InputError(record.place, "the text is empty", "Remove the row")
        ids = begin + ids
        room = config.data.max_length - len(tail_ids)  # the text is cut, never what follows it
        if room < 1:
            remedy = "Raise data.max_length or shorten objective.prompt"
            raise InputError(
                f"data.max_length={config.data.max_length}", "the prompt leaves no room for the text", remedy
            )
        if len(ids) > room:
            examples.report.truncated_rows += 1
            examples.report.truncated_tokens += len(ids) - room
        ids = ids[:room] + tail_ids
        examples.add(ids, [False] * len(ids), record.place, index[record.label])
    return examples.freeze()


def blocks(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, config: Config) -> Examples:
    """Plain text as one stream, cut into blocks of `data.max_length` tokens; every token but a block's first is predicted.

    Documents are separated by BOS where the tokenizer adds one to a text, otherwise by the end-of-text token.
    """
    streams = [_document(r.text or "", tokenizer) for r in records]
    if not adds_bos(tokenizer) and tokenizer.eos_token_id is not None:
        end = (np.array([tokenizer.eos_token_id]), np.zeros(1, np.int64))
        streams = [part for stream in streams for part in (stream, end)]
    examples = Examples()
    if streams:
        ids = np.concatenate([s[0] for s in streams])
        num_bytes = np.concatenate([s[1] for s in streams])
        length = config.data.max_length
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) > 1:
                examples.add(
                    part,
                    [False] + [True] * (len(part) - 1),
                    f"block {start // length}",
                    num_bytes=int(num_bytes[start + 1 : start + length].sum()),
                )
    return examples.freeze()


def documents(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """Plain text, one document a row, cut at `max_length`: what forgetting is measured on."""
    examples = Examples()
    for record in records:
        ids, num_bytes = _document(record.text or "", tokenizer)
        cut = len(ids) - max_length
        if cut > 0:
            examples.report.truncated_rows += 1
            examples.report.truncated_tokens += cut
        ids, num_bytes = ids[:max_length], num_bytes[:max_length]
        if len(ids) > 1:
            examples.add(ids, [False] + [True] * (len(ids) - 1), record.place, num_bytes=int(num_bytes[1:].sum()))
    return examples.freeze()


def _document(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and, for each, how many UTF-8 bytes of the text it is the first to reach the end of."""
    out = tokenizer(text, return_offsets_mapping=True, verbose=False)  # it warns of lengths that we cut below
    byte_end = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])]).astype(np.int64)
    ends = byte_end[np.array([j for _, j in out["offset_mapping"]], dtype=np.int64)]
    reached = np.maximum.accumulate(ends)
    return np.array(out["input_ids"]), np.diff(reached, prepend=0)


def _add_truncated(
    examples: Examples, ids: list[int], mask: list[bool], place: str, stops: set[int], config: Config
) -> None:
    limit = config.data.max_length
    if len(ids) > limit:
        examples.report.truncated_rows += 1
        examples.report.truncated_tokens += len(ids) - limit
    if any(mask[1:limit]):
        examples.add(ids[:limit], mask[:limit], place)
        examples.report.stop_rows += any(m and i in stops for i, m in zip(ids[:limit], mask[:limit], strict=True))
    else:
        examples.report.dropped.append(place + (" (its answer lies beyond the cut)" if any(mask[1:]) else ""))


def _require_supervision(examples: Examples, config: Config) -> None:
    dropped = examples.report.dropped
    if dropped and (config.data.unsupervised is Unsupervised.refuse or not len(examples)):
        count = "every row" if not len(examples) else f"{len(dropped)} of {len(dropped) + len(examples)} rows"
        remedy = f"Mend them, raise data.max_length={config.data.max_length}"
        remedy += ", or drop them: data.unsupervised=drop" if len(examples) else ", or check the chat template"
        raise InputError(_places(dropped), f"{count} has no token to train on", remedy)


def _places(places: list[str]) -> str:
    return ", ".join(places[:NAMED]) + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
