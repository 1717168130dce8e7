"""What a model makes of each row, one by one: for a person who wants to see what the figures come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from tritune.trainer.batch import Batch
from tritune.trainer.data.examples import Examples
from tritune.trainer.objectives.loss import Loss, Objective, StepContext
from tritune.trainer.parallel.distributed import World
from tritune.trainer.redact import redact_tree

DIGITS, MOST = 6, 100
SHOWN = 256  # tokens of a text without a prompt that are written: a document may be a book


class Recorder:
    """An objective that keeps what it computes of each row while a split is scored; no forward is made twice."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.sources, self.coefficients = objective, objective.sources, objective.coefficients
        self.kept: dict[int, dict[str, Tensor]] = {}

    def prepare(self, context: StepContext, window: list[Batch]) -> Iterable[list[Batch]]:
        return self.objective.prepare(context, window)

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.objective.weights(batch)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return self.objective(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        once = _Once(model)
        sums = self.objective.score(once, batch)
        each = {name: values.cpu() for name, values in self.objective.rows(once, batch).items()}
        for i, sample in enumerate(batch.sample_ids.tolist()):
            if sample >= 0:
                self.kept[sample] = {name: values[i] for name, values in each.items()}
        return sums

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.objective.rows(model, batch)

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return self.objective.report(sums)


def gathered(recorders: dict[str, Recorder], world: World) -> None:
    """Bring together what the ranks kept, on each of them."""
    for recorder in recorders.values():
        for kept in world.gather(recorder.kept):
            recorder.kept |= kept


class _Once(nn.Module):
    """A model that answers the second of two equal questions from memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._ask = [model]  # in a list: it is no part of this module
        self._kept: dict[str, Tensor] = {}

    def forward(self, batch: Batch, want: str) -> Tensor:
        if want not in self._kept:
            self._kept[want] = self._ask[0](batch, want)
        return self._kept[want]


def described(
    recorder: Recorder, examples: Examples, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase,
    below: float | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A JSON object for each row, in the split's order.

    Of a classifier: place, input, label (null where there is none), prediction, its probability, those of all labels, and whether
    it abstains. Else: place, input and reference (what the answer's or the text's predicted tokens spell), their mean loss and
    their number; of a text without a prompt the reference is its first `SHOWN` tokens, and `shown` says so where it has more.

    Args:
        below: the probability below which a classifier abstains; None never does.
    """
    for row, number in enumerate(examples.numbers.tolist()):
        found = recorder.kept[number]
        ids = np.asarray(examples.ids(row)).tolist()
        line: dict[str, Any] = {"place": examples.place(row)}
        if "probabilities" in found:
            label, chances = int(examples.labels[row]), found["probabilities"].double()
            best = int(chances.argmax())
            line |= {
                "input": tokenizer.decode(ids, skip_special_tokens=True), "label": labels[label] if label >= 0 else None,
                "prediction": labels[best], "probability": round(float(chances[best]), DIGITS),
                "probabilities": likeliest(labels, chances),
                "abstained": below is not None and float(chances[best]) < below,
            }  # fmt: skip
        else:
            trained = examples.trained(row)
            first, tokens = int(trained[0]) if len(trained) else len(ids), int(found["tokens"])
            written = trained[:SHOWN] if first == 1 else trained
            line |= {
                "input": tokenizer.decode(ids[:first]),
                "reference": tokenizer.decode([ids[i] for i in written], skip_special_tokens=True),
                "loss": float(found["nll"]) / max(tokens, 1), "tokens": tokens,
                **({"shown": len(written)} if len(written) < len(trained) else {}),
            }  # fmt: skip
        yield line


def likeliest(labels: Sequence[str], chances: Tensor) -> dict[str, float]:
    """The probability of each label; of more than `MOST` labels of the likeliest, in their order."""
    numbers = range(len(labels)) if len(labels) <= MOST else chances.argsort(descending=True)[:MOST].tolist()
    return {labels[i]: round(float(chances[i]), DIGITS) for i in numbers}


def write_predictions(path: Path, lines: Iterator[dict[str, Any]]) -> int:
    """Write a JSON object a line, secrets in its texts blotted out; return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        return sum(1 for line in lines if file.write(json.dumps(_without_secrets(line), ensure_ascii=False) + "\n"))


def _without_secrets(line: dict[str, Any]) -> dict[str, Any]:
    """Texts alone are looked through: a label's name, `reset_password`, says nothing of its probability."""
    return {key: redact_tree(value) if isinstance(value, str) else value for key, value in line.items()}
