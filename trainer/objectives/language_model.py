"""Next-token loss: continued pre-training (every token) and supervised fine-tuning (the responses' tokens).

Which tokens count is settled in the data (`Batch.predict`), so one objective serves both.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from tritune.trainer.batch import Batch
from tritune.trainer.objectives.loss import NLL, ONE_SOURCE, Loss, Sources, StepContext, means_by_source


class LanguageModel:
    """Negative log-likelihood per label token."""

    coefficients: ClassVar = {NLL: 1.0}

    def __init__(self, sources: Sources = ONE_SOURCE) -> None:
        self.sources = sources

    def prepare(self, context: StepContext, window: list[Batch]) -> list[list[Batch]]:
        return [window]

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {NLL: self._weight(batch)}

    def _weight(self, batch: Batch) -> Tensor:
        if self.sources.plain:
            return torch.full((), batch.predict.numel(), dtype=torch.float64, device=batch.predict.device)
        return self.sources.weigh(_sources(batch)).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        if self.sources.plain:
            return Loss({NLL: model(batch, "summed_nll")})
        nll, sources = model(batch, "token_nll"), _sources(batch)
        weighted = (self.sources.weigh(sources).to(nll.dtype) * nll).sum()
        return Loss({NLL: weighted}, by_source=self.sources.split(nll.detach(), sources))

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        each = model(batch, "token_nll").double()
        nll = each.sum()
        apart = {} if self.sources.plain else {"by_source": self.sources.split(each, _sources(batch))}
        return apart | {
            "nll": nll,
            "tokens": torch.tensor(float(batch.predict.numel()), dtype=torch.float64, device=nll.device),
            "bytes": torch.tensor(float(batch.num_bytes), dtype=torch.float64, device=nll.device),
        }

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        each = model(batch, "token_nll").double()
        return {"nll": batch.sum_by_document(each), "tokens": batch.sum_by_document(torch.ones_like(each))}

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        nll, tokens, num_bytes = (float(sums[k]) for k in ("nll", "tokens", "bytes"))
        loss = nll / tokens
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if num_bytes:
            figures["bits_per_byte"] = nll / math.log(2) / num_bytes
        return figures | (means_by_source(self.sources.names, sums["by_source"]) if "by_source" in sums else {})


def _sources(batch: Batch) -> Tensor:
    """The source of each predicted token, int64 [M]."""
    return batch.sources[batch.document_of(batch.predict)]
