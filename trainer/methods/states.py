"""A model's tensors as they are written: whole, in the export's dtype, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# From a tensor of the model to its values, whole. The model may hold them, or be one of meta tensors whose values are in files.
Read = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def as_it_is(tensor: Tensor) -> Tensor:
    """For whom shapes are enough: the model may be one of meta tensors."""
    return tensor.detach()


def cast_tensors(model: PreTrainedModel, dtype: torch.dtype, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The state dict in `dtype`, read tensor by tensor; a tied matrix comes under each of its names."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, read(tensor).to(dtype)


def shapes_of(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
