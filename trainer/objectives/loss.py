"""What is scored and how. An objective is arithmetic on what `TokenScorer` returns; it knows nothing of ranks or methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from tritune.trainer.batch import Batch
from tritune.trainer.config.registry import reading_text

NLL = "nll"  # the term of an objective that has one: the negative log-likelihood


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, summed and not averaged.

    Attributes:
        terms: by name, the sum of each, [].
        metrics: by name, the sum of what is to be logged beside the loss and how many it is of, each []; the same names in every
            micro-batch.
        by_source: float64 [2, sources], of each source the plain sum and how many tokens or rows it is of, to be logged; None
            where there is one source.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
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
        """The weight of each of `sources` [N], float64; by masks, since a table of the weights would wait for the device."""
        found = torch.zeros(sources.shape, dtype=torch.float64, device=sources.device)
        for number, weight in enumerate(self.weights):
            found = torch.where(sources == number, weight, found)
        return found


@dataclass(frozen=True)
class StepContext:
    """What an objective may use to prepare a step.

    Attributes:
        step: the number of the optimizer step, from 1; seed: of the run. Whatever is drawn is drawn from these two.
        model: what is called, as the backend wrapped it; all ranks call it equally often.
    """

    step: int
    seed: int
    model: nn.Module


class Objective(Protocol):
    """A loss of one or several terms. Over a whole window it is the sum over terms of coefficient * sum / weight, so no split of
    the window changes the gradient.
    """

    sources: Sources

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Of each term, by name."""
        ...

    def prepare(self, context: StepContext, window: list[Batch]) -> Iterable[list[Batch]]:
        """The micro-batches of each update that is made of a window; most make one update of it as it is.

        What must be known of the whole window first is computed here, without gradient.
        """
        ...

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        """By term, float64 []: label tokens, rows or pairs, that is, what the term's sum is to be divided by."""
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


def window_weights(objective: Objective, micro_batches: list[Batch]) -> Tensor:
    """The weights of this rank's part of an update, float64 [terms], in the order of the coefficients."""
    each = [objective.weights(batch) for batch in micro_batches]
    return torch.stack([torch.stack([w[term] for w in each]).sum() for term in objective.coefficients])


def scaled(objective: Objective, loss: Loss, weights: Tensor, dp_size: int) -> Tensor:
    """What is differentiated of a micro-batch: gradients are averaged over `dp_size` ranks.

    Args:
        weights: float64 [terms], of the whole update over all ranks. A term without any weight counts nothing.
    """
    parts = []
    for weight, (term, coefficient) in zip(weights.unbind(), objective.coefficients.items(), strict=True):
        factor = torch.where(weight == 0, 0.0, coefficient * (dp_size / weight))
        parts.append(loss.terms[term] * factor.to(loss.terms[term].dtype))
    return torch.stack(parts).sum()


def mean_loss(objective: Objective, sums: Tensor, weights: Tensor) -> Tensor:
    """The loss of an update from the sums and weights of its terms over all ranks, float64 [].

    NaN where no term has any weight, so that the update is refused.
    """
    coefficients = torch.tensor(list(objective.coefficients.values()), dtype=torch.float64, device=sums.device)
    total = torch.where(weights == 0, 0.0, coefficients * sums / weights).sum()
    return torch.where((weights == 0).all(), torch.nan, total)


ONE_SOURCE = Sources()


def text_loss(tokenizer: PreTrainedTokenizerBase) -> Objective:
    """What scores the retention text, whatever the run learns."""
    return reading_text().loss([], tokenizer, ONE_SOURCE)


def means_by_source(names: tuple[str, ...], sums: Tensor) -> dict[str, float]:
    """`loss/<source>` of sums [2, sources], where more than one source has any."""
    present = [(n, a / c) for n, a, c in zip(names, *sums.tolist(), strict=True) if c]
    return {f"loss/{name}": mean for name, mean in present} if len(present) > 1 else {}
