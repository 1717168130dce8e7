"""`tritune generate` of a classifier: the class of each text, read as it was read in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from tritune.trainer.config import Config
from tritune.trainer.config_choices import Overlong, TextUnit
from tritune.trainer.data.columns import columns_of
from tritune.trainer.data.encode import Labelled
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.forms import value_of
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.loader import evaluation_batches
from tritune.trainer.data.records import Row, read_all
from tritune.trainer.errors import InputError, some_names
from tritune.trainer.evaluation.predictions import likeliest
from tritune.trainer.objectives import Objective
from tritune.trainer.open import Opened
from tritune.trainer.scorer import TokenScorer


def read_texts(given: Sequence[str], config: Config) -> list[tuple[Row, str | InputError]]:
    """The texts of the command line, then those of `generate.file` (`text` or `prompt`); in the place of a row without one its
    fault."""
    found: list[tuple[Row, str | InputError]] = [
        (Row({"prompt": text}, f"--prompt {i}"), text) for i, text in enumerate(given, 1)
    ]
    if config.generate.file is not None:
        for row in read_all(config.generate.file, "generate.file", TextUnit.line):
            if isinstance(row, InputError):
                found.append((Row({}, row.value), row))
                continue
            columns = columns_of(row.fields.keys(), config.data)
            column = columns.get("text", columns.get("prompt"))
            try:
                if column is None:
                    rule = f"it has {some_names(row.fields)}, and a classifier reads a text in text or prompt"
                    raise InputError(row.place, rule, "Map it: data.columns.text=<name in the file>")
                found.append((row, value_of(row, column)))
            except InputError as fault:
                found.append((row, fault))
    return found


@torch.no_grad()
def label_texts(
    opened: Opened, objective: Objective, texts: Sequence[tuple[Row, str | InputError]], context: int | None
) -> Iterator[tuple[Row, dict[str, Any] | InputError]]:
    """For each text `{"text": label, "probability": p, "probabilities": {label: p}}`, or its fault.

    Args:
        context: tokens that the model can read; a longer text is cut as it is in training.
    """
    config, tokenizer = opened.config, opened.tokenizer
    length = min(config.data.max_length, context or config.data.max_length)
    data = replace(
        config.data, max_length=length, overlong=config.data.overlong if config.data.overlong.cuts else Overlong.cut
    )
    encode = Labelled(tokenizer, data, config.objective)
    batches: list[pa.RecordBatch] = []
    numbers: list[int] = []
    faults: dict[int, InputError] = {}
    for i, (row, text) in enumerate(texts):
        if isinstance(text, InputError):
            faults[i] = text
            continue
        encoded = encode([Record(place=row.place, text=text)])
        if encoded.bad:
            faults[i] = encoded.bad[0]
            continue
        batches.append(encoded.columns.batch())
        numbers.append(i)
    chances: dict[int, torch.Tensor] = {}
    if numbers:
        scorer = TokenScorer(opened.model, None, config.seed, config.kernels.loss_chunk_tokens).eval()
        device = next(opened.model.parameters()).device
        examples = Examples([pa.Table.from_batches(batches)], opened.labels)
        for batch in evaluation_batches(examples, config.evaluation.batch_size, tokenizer.pad_token_id, 0, 1, device):
            found = objective.rows(scorer, batch)["probabilities"].cpu()
            chances |= {numbers[s]: found[d] for d, s in enumerate(batch.sample_ids.tolist()) if s >= 0}
    for i, (row, _) in enumerate(texts):
        yield row, faults[i] if i in faults else _said(opened.labels, chances[i])


def _said(labels: Sequence[str], chances: torch.Tensor) -> dict[str, Any]:
    best = int(chances.argmax())
    each = likeliest(labels, chances)
    return {"text": labels[best], "probability": each[labels[best]], "probabilities": each}
