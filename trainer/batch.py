"""What passes from the data to the objectives: one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Shape suffixes: B rows, T positions, M predicted tokens.

    Attributes:
        input_ids: int64 [B, T], padded on the right. Attention is causal, so no real token ever sees the padding.
        lengths: int64 [B].
        sample_ids: int64 [B], numbers in the data set; -1 fills.
        predict: int64 [M], flat positions b * T + t of the hidden states that predict.
        targets: int64 [M], the tokens they predict.
        labels: int64 [B], classes; -1 where there is none.
        num_tokens, num_bytes: real tokens; bytes spelled by the predicted ones (0 where not counted).
        digest: checksum of the rows, summed, so that it is the same however a window is split over ranks.
        step, index: optimizer step and number of the micro-batch in its window over all ranks.
    """

    input_ids: Tensor
    lengths: Tensor
    sample_ids: Tensor
    predict: Tensor
    targets: Tensor
    labels: Tensor
    num_tokens: int
    num_bytes: int
    digest: int
    step: int
    index: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        names = ("input_ids", "lengths", "sample_ids", "predict", "targets", "labels")
        return replace(self, **{n: getattr(self, n).pin_memory().to(device, non_blocking=True) for n in names})
