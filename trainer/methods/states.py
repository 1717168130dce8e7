"""A model's tensors as they are written: whole, in the export's dtype, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

# From a tensor of the model to its values, whole. The model may hold them, or be one of meta tensors whose values are in files.
Read = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def as_it_is(tensor: Tensor) -> Tensor:
    """For whom shapes are enough: the model may be one of meta tensors."""
    return tensor.detach()


@torch.no_grad()
def copy_into(places: dict[str, Tensor], tensors: dict[str, Tensor], value: str) -> None:
    """Copy tensors to the places of their names.

    Raises:
        InputError: names or shapes differ; it begins with `value`.
    """
    shapes, found = ({n: list(t.shape) for n, t in some.items()} for some in (places, tensors))
    differ = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
    if differ:
        name = differ[0]
        rule = f"{len(differ)} tensor(s) of the adapter do not fit: {bounded(name, 200)} is {found.get(name, 'not')} there, and "
        rule += f"{shapes.get(name, 'not')} in the model"
        raise InputError(
            value, rule, "Check that its base, the method's keys and the labels are those that it was trained with"
        )
    for name, place in places.items():
        place.copy_(tensors[name])


def cast_tensors(model: PreTrainedModel, dtype: torch.dtype, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The state dict in `dtype`, read tensor by tensor; a tied matrix comes under each of its names."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, read(tensor).to(dtype)


def shapes_of(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
