"""Next-token loss: continued pre-training (every token) and supervised fine-tuning (the responses' tokens).

Which tokens count is settled in the data (`Batch.predict`), so one objective serves both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tritune.trainer.batch import Batch
from tritune.trainer.objectives import Loss


class LanguageModel:
    """Negative log-likelihood per label token."""

    def prepare(self, model: nn.Module, micro_batches: list[Batch]) -> list[Batch]:
        return micro_batches

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor([batch.predict.numel()], dtype=torch.float64, device=batch.predict.device)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(batch, "summed_nll")[None])

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        nll = model(batch, "token_nll").double().sum()
        return {
            "nll": nll,
            "tokens": torch.tensor(float(batch.predict.numel()), dtype=torch.float64, device=nll.device),
            "bytes": torch.tensor(float(batch.num_bytes), dtype=torch.float64, device=nll.device),
        }

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        nll, tokens, num_bytes = (float(sums[k]) for k in ("nll", "tokens", "bytes"))
        loss = nll / tokens
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if num_bytes:
            figures["bits_per_byte"] = nll / math.log(2) / num_bytes
        return figures
