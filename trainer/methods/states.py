"""A model's tensors as they are written: whole, in the export's dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict in `dtype`. Tensors that were one stay one, or a tied matrix would be written twice."""
    done: dict[int, Tensor] = {}
    return {n: done.setdefault(id(t), whole(t).to(dtype)) for n, t in model.state_dict(keep_vars=True).items()}


def shapes_of(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
