"""`tritune generate` of a classifier: the class of each text, read as it was read in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from tritune.trainer.config.choices import Overlong
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.columns import columns_of
from tritune.trainer.data.encode import Encoded, Labelled
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.forms import value_of
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.loader import evaluation_batches
from tritune.trainer.data.prompts import read_asked
from tritune.trainer.data.records import Row
from tritune.trainer.errors import InputError, some_names
from tritune.trainer.evaluation.predictions import likeliest
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.objectives.loss import Objective
from tritune.trainer.open import Opened

Asked = Sequence[tuple[Row, str | InputError]]
ENCODED = 1000  # texts at a time


def read_texts(given: Sequence[str], file: str | None, data: DataConfig) -> Asked:
    """The texts of the command line, then those of `generate.file` (`text` or `prompt`); in the place of a row without one its
    fault."""
    return list(read_asked(given, file, data, _text))


def _text(row: Row, data: DataConfig) -> str:
    columns = columns_of(row.fields.keys(), data)
    column = columns.get("text", columns.get("prompt"))
    if column is None:
        rule = f"it has {some_names(row.fields)}, and a classifier reads a text in text or prompt"
        raise InputError(row.place, rule, "Map it: data.columns.text=<name in the file>")
    return value_of(row, column)


@torch.no_grad()
def label_texts(
    opened: Opened,
    scorer: TokenScorer,
    objective: Objective,
    texts: Asked,
    context: int | None,
    device: torch.device,
    below: float | None = None,
) -> Iterator[tuple[Row, dict[str, Any] | InputError]]:
    """For each text what the model answers, or the text's fault.

    An answer is `{"text": label, "abstained": false, "guess": label, "probability": p, "probabilities": {label: p}}`; where the
    model abstains, its text is None.

    Args:
        scorer: what is called; on all ranks alike.
        context: tokens that the model can read; a longer text is cut as it is in training.
        below: the probability below which it abstains; None never does.
    """
    config, tokenizer = opened.config, opened.tokenizer
    length = min(config.data.max_length, context or config.data.max_length)
    data = replace(
        config.data, max_length=length, overlong=config.data.overlong if config.data.overlong.cuts else Overlong.cut
    )
    encode = Labelled(tokenizer, data, config.objective)
    faults = {i: text for i, (_, text) in enumerate(texts) if isinstance(text, InputError)}
    # A text's number is its place: two rows of a file may have the same one.
    records = [Record(place=str(i), text=text) for i, (_, text) in enumerate(texts) if not isinstance(text, InputError)]
    tables = []
    for start in range(0, len(records), ENCODED):
        for encoded in _encoded(encode, records[start : start + ENCODED]):
            for fault in encoded.bad:
                number = int(fault.value)
                faults[number] = InputError(texts[number][0].place, fault.rule, fault.remedy)
            tables.append(pa.Table.from_batches([encoded.columns.batch()]))
    examples = Examples(tables, opened.labels)
    chances: dict[int, torch.Tensor] = {}
    if len(examples):
        for batch in evaluation_batches(examples, config.evaluation.batch_size, tokenizer.pad_token_id, 0, 1, device):
            found = objective.rows(scorer, batch)["probabilities"].cpu()
            numbers = [(d, int(examples.place(s))) for d, s in enumerate(batch.sample_ids.tolist()) if s >= 0]
            chances |= {number: found[d] for d, number in numbers}
    for i, (row, _) in enumerate(texts):
        yield row, faults[i] if i in faults else _said(opened.labels, chances[i], below)


def _encoded(encode: Labelled, records: list[Record]) -> list[Encoded]:
    """All at once; where the tokenizer fails on a text, one by one, and that one is a fault."""
    try:
        return [encode(records)]
    except InputError as error:
        if len(records) == 1:
            return [Encoded(bad=[error])]
    return [one for record in records for one in _encoded(encode, [record])]


def _said(labels: Sequence[str], chances: torch.Tensor, below: float | None) -> dict[str, Any]:
    best = int(chances.argmax())
    each = likeliest(labels, chances)
    abstained = below is not None and float(chances[best]) < below
    return {
        "text": None if abstained else labels[best],
        "abstained": abstained,
        "guess": labels[best],
        "probability": each[labels[best]],
        "probabilities": each,
    }
