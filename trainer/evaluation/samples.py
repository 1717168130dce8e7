"""A few held-out rows on which base and tuned answer freely: what the figures mean, to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import GenerateConfig
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import collate
from tritune.trainer.evaluation.generate import Generate, generate
from tritune.trainer.objectives.loss import Objective

OPENING = 24  # tokens of a text that a language model is given to go on from


@dataclass(frozen=True)
class Sample:
    """One row: what the model reads, what stands in the data, and token ids of the former (not written down)."""

    place: str
    prompt: str
    reference: str
    ids: tuple[int, ...]
    row: int


def pick(split: Examples, count: int, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[Sample]:
    """Rows spread evenly over the split; the same for base and tuned, and for every run on it."""
    samples = []
    for row in np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)):
        ids, label = split.ids(row).tolist(), int(split.labels[row])
        supervised = split.trained(row)
        if label >= 0:
            first, reference = len(ids), labels[label]
        else:
            # A text has no prompt: everything but its first token is predicted.
            first = int(supervised[0]) if supervised[0] > 1 else min(OPENING, max(len(ids) // 2, 1))
            reference = str(tokenizer.decode(ids[first:], skip_special_tokens=True)).rstrip("\n")
        samples.append(
            Sample(split.place(row), str(tokenizer.decode(ids[:first])), reference, tuple(ids[:first]), int(row))
        )
    return samples


def answer(
    samples: list[Sample],
    model: PreTrainedModel,
    model_generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    stops: Sequence[int],
    device: torch.device,
    context: int | None,
    float64: bool,
) -> list[str]:
    """The likeliest continuation of each sample's prompt."""  # fmt: skip
    room = min([config.max_new_tokens, *([context - len(s.ids) for s in samples] if context else [])])
    if room < 1:
        return ["(the prompt fills the model's context)"] * len(samples)
    settings = replace(config, max_new_tokens=room, num_samples=1, temperature=0.0)
    said = generate(
        model, model_generate, tokenizer, [s.ids for s in samples], settings, stops, device, float64=float64
    )
    return [a[0].text + ("" if a[0].stopped else " ...") for a in said]


@torch.no_grad()
def answer_by_label(
    samples: list[Sample],
    split: Examples,
    model: nn.Module,
    objective: Objective,
    labels: Sequence[str],
    pad_id: int,
    device: torch.device,
) -> list[str]:
    """The class that the model finds likeliest for each sample."""  # fmt: skip
    batch = collate(split, [s.row for s in samples], pad_id).to(device)
    return [labels[i] for i in objective.rows(model, batch)["probabilities"].argmax(dim=-1).tolist()]
