"""What is scored and how. An objective is arithmetic on what `TokenScorer` returns; it knows nothing of ranks or methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from tritune.trainer.batch import Batch
from tritune.trainer.config.registry import reading_text


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, summed and not averaged.

    Attributes:
        sums: [terms].
        by_source: float64 [2, sources], of each source the plain sum and how many tokens or rows it is of, to be logged; None
            where there is one source.
    """

    sums: Tensor
    by_source: Tensor | None = None


@dataclass(frozen=True)
class Sources:
    """The sources that rows come from, and what each counts in the loss.

    Of several the loss is the mean over all tokens (rows of a classifier), each with its source's weight: the sum of w x nll over
    the sum of w.
    """

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def plain(self) -> bool:
        """One source, or none named: nothing is to be told apart."""
        return len(self.names) < 2

    def split(self, values: Tensor, sources: Tensor) -> Tensor:
        """Return float64 [2, sources]: sums of `values` [N] and their counts, by source.

        By masks and not by `index_add`, whose order of additions on a GPU differs from run to run.
        """
        mine = sources[None, :] == torch.arange(len(self.names), device=sources.device)[:, None]
        return torch.stack([(mine * values.double()).sum(dim=1), mine.sum(dim=1).double()])

    def weigh(self, sources: Tensor) -> Tensor:
        """The weight of each of `sources` [N], float64."""
        return torch.tensor(self.weights, dtype=torch.float64, device=sources.device)[sources]


class Objective(Protocol):
    """A loss with its weight: over the whole window, loss = sums / weight, so no split of it changes the gradient."""

    sources: Sources

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

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What is known of each document, float64 [D, ...]: `probabilities` of the classes; or `nll` and `tokens`."""
        ...

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums -> figures; `loss` is always among them."""
        ...


def window_weight(objective: Objective, micro_batches: list[Batch]) -> Tensor:
    """Weight of this rank's part of the window, float64 [terms]."""
    return torch.stack([objective.weight(batch) for batch in micro_batches]).sum(dim=0)


ONE_SOURCE = Sources()


def text_loss(tokenizer: PreTrainedTokenizerBase) -> Objective:
    """What scores the retention text, whatever the run learns."""
    return reading_text().loss([], tokenizer, ONE_SOURCE)


def means_by_source(names: tuple[str, ...], sums: Tensor) -> dict[str, float]:
    """`loss/<source>` of sums [2, sources], where more than one source has any."""
    present = [(n, a / c) for n, a, c in zip(names, *sums.tolist(), strict=True) if c]
    return {f"loss/{name}": mean for name, mean in present} if len(present) > 1 else {}
