"""Records to rows in memory, through the encoders and the counting that sources go through."""

from __future__ import annotations

import pyarrow as pa
from tritune.trainer.config import Config
from tritune.trainer.data.encode import Conversations, Documents, Labelled
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.pipeline import encode_records
from tritune.trainer.data.splits import require_stop_token
from tritune.trainer.data.tables import Divider, require_supervision
from tritune.trainer.model.tokenizer import stop_token_ids


def tokenized(records, encoder, data, block=None, labels=()) -> Examples:
    """From records to rows, as a source's chunks go."""
    batches, left_out = [], []
    divider = Divider({}, data, block, lambda _, batch: batches.append(batch), lambda *why: left_out.append(why))
    divider.take(encode_records(records, encoder))
    divider.end()
    report = divider.sinks["train"].report
    assert len(left_out) == report.bad + report.dropped + report.too_long + report.duplicates
    if isinstance(encoder, Conversations):
        require_supervision({"train": report}, data)
    made = Examples([pa.Table.from_batches(batches)] if batches else [], labels, None, report)
    assert made.digest == divider.sinks["train"].digest.hexdigest() or labels or not batches, (
        "as it is written, so it is read"
    )
    return made


def conversations(records, tokenizer, config, model_stops=()) -> Examples:
    stops = stop_token_ids(tokenizer, list(model_stops))
    made = tokenized(records, Conversations(tokenizer, config.data, stops), config.data)
    if config.data.require_stop_token:
        require_stop_token([made.report], tokenizer, stops, config.data)
    return made


def labelled(records, tokenizer, config, labels) -> Examples:
    return tokenized(records, Labelled(tokenizer, config.data, config.objective), config.data, labels=labels)


def blocks(records, tokenizer, config) -> Examples:
    return tokenized(records, Documents(tokenizer, separate=True), config.data, config.data.max_length)


def documents(records, tokenizer, limit) -> Examples:
    return tokenized(records, Documents(tokenizer, separate=False, limit=limit), Config().data)
