"""Classification, by a head on the last token or by one label token that the language model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from tritune.trainer.batch import Batch
from tritune.trainer.errors import InputError
from tritune.trainer.metrics.classification import classification_report, confusion
from tritune.trainer.objectives.loss import NLL, ONE_SOURCE, Loss, Sources, StepContext, means_by_source


class Classes:
    """Cross entropy over classes.

    Args:
        num_labels: C.
        token_ids: the label tokens for classification by token; None for a head with C outputs. The loss then runs over
            the whole vocabulary, so that the exported model says the label when it generates; accuracy is over the labels.
    """

    coefficients: ClassVar = {NLL: 1.0}

    def __init__(self, num_labels: int, token_ids: list[int] | None = None, sources: Sources = ONE_SOURCE) -> None:
        self.num_labels, self.sources = num_labels, sources
        self.token_ids = None if token_ids is None else torch.tensor(token_ids)

    def prepare(self, context: StepContext, window: list[Batch]) -> list[list[Batch]]:
        return [window]

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {NLL: self._weight(batch)}

    def _weight(self, batch: Batch) -> Tensor:
        real = batch.labels >= 0
        if self.sources.plain:
            return real.sum().double()
        return (self.sources.weigh(batch.sources) * real).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logits, targets = self._logits(model, batch)
        if self.sources.plain:
            return Loss({NLL: cross_entropy(logits, targets, ignore_index=-1, reduction="sum")})
        nll = cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        weighted = (self.sources.weigh(batch.sources).to(nll.dtype) * nll).sum()
        return Loss({NLL: weighted}, by_source=self._apart(nll.detach(), batch))

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits, targets = self._logits(model, batch)
        nll = cross_entropy(logits.double(), targets, ignore_index=-1, reduction="none")
        return ({} if self.sources.plain else {"by_source": self._apart(nll, batch)}) | {
            "nll": nll.sum(),
            "rows": (batch.labels >= 0).sum().double(),
            "confusion": confusion(batch.labels, self._among_labels(logits).argmax(dim=-1), self.num_labels),
        }

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"probabilities": self._among_labels(self._logits(model, batch)[0]).double().softmax(dim=-1)}

    def report(self, sums: dict[str, Tensor]) -> dict[str, float]:
        apart = means_by_source(self.sources.names, sums["by_source"]) if "by_source" in sums else {}
        return {"loss": float(sums["nll"] / sums["rows"]), **classification_report(sums["confusion"]), **apart}

    def _apart(self, nll: Tensor, batch: Batch) -> Tensor:
        """By source, rows that fill left out."""
        real = batch.labels >= 0
        return self.sources.split(nll[real], batch.sources[real])

    def _among_labels(self, logits: Tensor) -> Tensor:
        return logits if self.token_ids is None else logits[:, self.token_ids.to(logits.device)]

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits [B, C or V] and the targets among them, -1 for rows that fill."""
        if self.token_ids is None:
            return model(batch, "class_logits"), batch.labels
        token_ids = self.token_ids.to(batch.labels.device)
        targets = torch.where(batch.labels >= 0, token_ids[batch.labels.clamp(min=0)], -1)
        return model(batch, "last_logits"), targets


def label_token_ids(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Choose one token for each label: the first of its own that no other label took, else any ordinary unused one.

    Deterministic in the labels' order and the vocabulary; no embedding is added, so LoRA with a frozen head works.
    """
    special, taken, chosen = set(tokenizer.all_special_ids), set(), []
    spare = iter(i for i in range(len(tokenizer)) if i not in special)
    for label in labels:
        own = tokenizer(" " + label.replace("_", " "), add_special_tokens=False)["input_ids"]
        token = next((t for t in own if t not in taken and t not in special), None)
        if token is None:
            token = next((t for t in spare if t not in taken), None)
        if token is None:
            rule = f"{len(labels)} labels need as many tokens, and the vocabulary has {len(tokenizer)}"
            raise InputError("objective=classify_token", rule, "Use objective=classify, by a head")
        taken.add(token)
        chosen.append(token)
    return chosen
