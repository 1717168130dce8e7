"""`objective=contrast`: learn an answer, and that it is likelier than its words in reverse; one file, outside of the package.

Two terms (the answer's tokens, and pairs), a metric, and units of two documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import logsigmoid
from tritune.trainer.config.axes import Learns, Metric, ObjectiveConfig, lower_is_better
from tritune.trainer.config.choices import Kind
from tritune.trainer.errors import InputError
from tritune.trainer.objectives.loss import Loss


@dataclass
class ContrastConfig(ObjectiveConfig):
    name: str = "contrast"
    beta: float = 0.1  # of the difference between the answers' log-probabilities
    twice: bool = False  # two updates of each window

    title = "answers against their words in reverse"
    learns = Learns.answers
    kinds = (Kind.prompt_response,)
    metrics = lower_is_better("loss") | {"pairs_right": Metric(higher_is_better=True)}
    documents = 2

    def check(self, rule) -> None:
        rule(self.beta > 0, "objective.beta", "it scales a difference. Use a positive value, e.g. 0.1")

    def documents_of(self, record) -> list:
        backwards = " ".join(reversed(record.response.split()))
        if backwards == record.response:
            raise InputError(record.place, "the answer reads the same in reverse", "Leave it out: data.bad_rows=skip")
        return [record, replace(record, response=backwards)]

    def loss(self, labels: Sequence[str], tokenizer, sources) -> Contrast:
        return Contrast(self.beta, self.twice, sources)


class Contrast:
    coefficients = {"answer": 1.0, "pair": 0.5}  # noqa: RUF012

    def __init__(self, beta: float, twice: bool, sources) -> None:
        self.beta, self.twice, self.sources = beta, twice, sources

    def prepare(self, context, window: list) -> Iterable[list]:
        yield window
        if self.twice:
            yield window

    def weights(self, batch) -> dict[str, torch.Tensor]:
        tokens = batch.sum_by_document(torch.ones_like(batch.predict, dtype=torch.float64))
        return {"answer": tokens[::2].sum(), "pair": (batch.sample_ids[::2] >= 0).sum().double()}

    def __call__(self, model, batch) -> Loss:
        better, margins = self._scores(model, batch)
        real = (batch.sample_ids[::2] >= 0).to(margins.dtype)
        right = ((margins > 0).double() * real).sum()
        return Loss({"answer": better.sum(), "pair": -(logsigmoid(self.beta * margins) * real).sum()},
                    metrics={"pairs_right": (right, real.double().sum())})  # fmt: skip

    def score(self, model, batch) -> dict[str, torch.Tensor]:
        loss, weights = self(model, batch), self.weights(batch)
        return (
            {f"sum_{n}": t.double() for n, t in loss.terms.items()}
            | weights
            | {"right": loss.metrics["pairs_right"][0]}
        )

    def rows(self, model, batch) -> dict[str, torch.Tensor]:
        each = model(batch, "token_nll").double()
        return {"nll": batch.sum_by_document(each), "tokens": batch.sum_by_document(torch.ones_like(each))}

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        loss = sum(c * float(sums[f"sum_{n}"] / sums[n]) for n, c in self.coefficients.items())
        return {"loss": loss, "pairs_right": float(sums["right"] / sums["pair"])}

    def _scores(self, model, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative log-likelihood of each better answer, and by how much each is likelier than its pair, both [units]."""
        nll = batch.sum_by_document(model(batch, "token_nll")).reshape(-1, batch.unit)
        return nll[:, 0], nll[:, 1] - nll[:, 0]
