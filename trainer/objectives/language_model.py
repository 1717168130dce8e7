"""Next-token loss: continued pre-training (every token) and supervised fine-tuning (the responses' tokens).

Which tokens count is settled in the data (`Batch.predict`), so one objective serves both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tritune.trainer.batch import Batch
from tritune.trainer.objectives.loss import ONE_SOURCE, Loss, Sources, means_by_source


class LanguageModel:
    """Negative log-likelihood per label token."""

    def __init__(self, sources: Sources = ONE_SOURCE) -> None:
        self.sources = sources

    def prepare(self, model: nn.Module, micro_batches: list[Batch]) -> list[Batch]:
        return micro_batches

    def weight(self, batch: Batch) -> Tensor:
        if self.sources.plain:
            return torch.tensor([batch.predict.numel()], dtype=torch.float64, device=batch.predict.device)
        return self.sources.weigh(_sources(batch)).sum()[None]

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        if self.sources.plain:
            return Loss(model(batch, "summed_nll")[None])
        nll, sources = model(batch, "token_nll"), _sources(batch)
        weighted = (self.sources.weigh(sources).to(nll.dtype) * nll).sum()
        return Loss(weighted[None], self.sources.split(nll.detach(), sources))

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
        each, rows = model(batch, "token_nll").double(), batch.document_of(batch.predict)
        empty = torch.zeros(len(batch.lengths), dtype=torch.float64, device=each.device)
        return {"nll": empty.index_add(0, rows, each), "tokens": empty.index_add(0, rows, torch.ones_like(each))}

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
