"""Logits of a model whose parameters are read while it computes: no more of them exist than those of the module at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.trainer.model.attention import within_rows


@torch.no_grad()
def logits_by_module(
    model: PreTrainedModel, read: Callable[[Tensor], Tensor], dtype: torch.dtype, input_ids: Tensor
) -> Tensor:
    """What `model` computes on the CPU in `dtype`, [B, T, V] or [B, C] of a classifier, in that dtype.

    Args:
        model: of meta tensors, whose modules use no parameter of another module but of those they name in `computes`: the
            families that tests know.
        read: the values of one of its parameters, whole.
        input_ids: int64 [B, T].
    """
    handles = []
    for module in model.modules():
        for owner in (module, *getattr(module, "computes", [])):  # DoRA's layer computes with its base's weight
            own = dict(owner.named_parameters(recurse=False))
            if own:
                handles.append(module.register_forward_pre_hook(_filling(owner, own, read, dtype)))
                handles.append(module.register_forward_hook(_emptying(owner, own), always_call=True))
    try:
        with within_rows(model):
            return model(input_ids=input_ids.cpu(), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _filling(
    owner: nn.Module, own: dict[str, nn.Parameter], read: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Any:
    def fill(module: nn.Module, arguments: Any) -> None:
        for name, parameter in own.items():
            values = read(parameter)
            cast = values.to(dtype) if values.is_floating_point() else values
            setattr(owner, name, nn.Parameter(cast, requires_grad=False))

    return fill


def _emptying(owner: nn.Module, own: dict[str, nn.Parameter]) -> Any:
    def empty(module: nn.Module, arguments: Any, output: Any) -> None:
        for name, parameter in own.items():
            setattr(owner, name, parameter)

    return empty
