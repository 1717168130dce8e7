"""What passes from the data to the objectives: one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packs:
    """Where documents lie in rows that hold several. Shape suffixes: B rows, T positions, S spans.

    Attributes:
        positions: int64 [B, T], from 0 in each document.
        documents: int64 [B, T], the number of each token's document in the batch.
        bounds: int32 [S + 1], flat positions where one document ends and the next begins; padding is one.
        longest: tokens of the longest of these.
    """

    positions: Tensor
    documents: Tensor
    bounds: Tensor
    longest: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Shape suffixes: B rows, T positions, D documents, M predicted tokens.

    A row is a document, padded on the right, or several documents that do not see one another, one behind the other (`packs`).

    Attributes:
        input_ids: int64 [B, T]. Attention is causal, so no real token ever sees the padding.
        starts, lengths: int64 [D], flat positions b * T + t where documents begin, and their tokens.
        sample_ids: int64 [D], numbers in the data set; -1 fills.
        predict: int64 [M], flat positions b * T + t of the hidden states that predict.
        targets: int64 [M], the tokens they predict.
        labels: int64 [D], classes; -1 where there is none.
        sources: int64 [D], which source of the data each is from.
        packs: None where each row is one document (D = B).
        unit: how many consecutive documents are one unit.
        num_tokens, num_bytes: real tokens; bytes spelled by the predicted ones (0 where not counted).
        digest: checksum of the documents, summed, so that it is the same however a window is split over ranks or packed.
        step, index: optimizer step and number of the micro-batch in its window over all ranks.
    """

    input_ids: Tensor
    starts: Tensor
    lengths: Tensor
    sample_ids: Tensor
    predict: Tensor
    targets: Tensor
    labels: Tensor
    sources: Tensor
    packs: Packs | None
    num_tokens: int
    num_bytes: int
    digest: int
    step: int
    index: int
    unit: int = 1

    def sum_by_document(self, values: Tensor) -> Tensor:
        """Sums of what belongs to the predicted tokens, [M] -> [D]; the same from run to run, also on a GPU."""
        documents = self.document_of(self.predict)
        edges = torch.arange(len(self.lengths) + 1, device=documents.device)
        counts = torch.searchsorted(documents, edges).diff()  # in order; a bincount would wait for the GPU
        return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)

    def document_of(self, positions: Tensor) -> Tensor:
        """The document, int64, in which each of some flat positions lies."""
        if self.packs is None:
            return positions // self.input_ids.shape[1]
        return self.packs.documents.reshape(-1)[positions]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        def all_of(holder: Any, *names: str) -> dict[str, Any]:
            return {name: moved(getattr(holder, name)) for name in names}

        packs = self.packs and replace(self.packs, **all_of(self.packs, "positions", "documents", "bounds"))
        names = ("input_ids", "starts", "lengths", "sample_ids", "predict", "targets", "labels", "sources")
        return replace(self, packs=packs, **all_of(self, *names))


def rows_of(input_ids: Tensor, step: int = 0, first_sample: int = 0) -> Batch:
    """Whole rows of which every token but the first is predicted: for checks and benchmarks.

    Args:
        input_ids: int64 [B, T].
    """
    num_rows, num_positions = input_ids.shape
    rows = torch.arange(num_rows, device=input_ids.device)
    starts = rows * num_positions
    predict = (starts[:, None] + torch.arange(num_positions - 1, device=input_ids.device)).reshape(-1)
    return Batch(
        input_ids=input_ids, starts=starts, lengths=torch.full_like(rows, num_positions), sample_ids=rows + first_sample,
        predict=predict, targets=input_ids[:, 1:].reshape(-1), labels=torch.full_like(rows, -1),
        sources=torch.zeros_like(rows), packs=None, num_tokens=input_ids.numel(), num_bytes=0, digest=0, step=step, index=0,
    )  # fmt: skip
