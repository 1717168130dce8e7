"""Score a split: sums over batches and ranks first, figures once at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tritune.trainer.backends import Backend
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import evaluation_batches
from tritune.trainer.evaluation.choices import Choices, choose
from tritune.trainer.objectives.loss import Objective


@torch.no_grad()
def evaluate(
    objective: Objective,
    model: nn.Module,
    examples: Examples,
    backend: Backend,
    batch_size: int,
    pad_id: int,
    choices: Choices | None = None,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the objective's figures on `examples`; the same on all ranks. The model's training mode is put back.

    Args:
        choices: the split's rows with every choice, whose accuracy is reported as well.
        heed: called before each batch, on all ranks alike; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    try:
        for batch in evaluation_batches(examples, batch_size, pad_id, backend.dp_rank, backend.dp_size, backend.device):
            heed()
            for name, value in objective.score(model, batch).items():
                sums[name] = sums[name] + value if name in sums else value
        figures = objective.report({name: backend.sum(value).cpu() for name, value in sums.items()})
        if choices is not None:
            figures |= choose(model, choices, backend, batch_size, pad_id, heed)
    finally:
        model.train(was_training)
    return figures
