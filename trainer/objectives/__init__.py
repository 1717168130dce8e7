"""What is scored and how. An objective is arithmetic on what `TokenScorer` returns; it knows nothing of ranks or methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tritune.trainer.batch import Batch


@dataclass(frozen=True)
class Loss:
    """`sums`: [terms], the loss of a micro-batch summed, not averaged, one entry per term."""

    sums: Tensor


class Objective(Protocol):
    """A loss with its weight: over the whole window, loss = sums / weight, so no split of it changes the gradient."""

    def prepare(self, model: nn.Module, micro_batches: list[Batch]) -> list[Batch]:
        """Whatever must be known of the whole window first, without gradient; most return it unchanged."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """float64 [terms]: label tokens or rows, that is, what `sums` is to be divided by."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums (float64) that evaluation adds up over batches and ranks."""
        ...

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums -> figures; `loss` is always among them."""
        ...


def window_weight(objective: Objective, micro_batches: list[Batch]) -> Tensor:
    """Weight of this rank's part of the window, float64 [terms]."""
    return torch.stack([objective.weight(batch) for batch in micro_batches]).sum(dim=0)
