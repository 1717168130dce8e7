"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174), a decoder layer at a time: keep less, compute again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tritune.trainer.config import TrainConfig
from tritune.trainer.config.choices import Activations
from tritune.trainer.methods.token_keys import TokenKeys
from tritune.trainer.model.layers import decoder_layers
from tritune.trainer.torch_api import bypassing_hooks

# Kept by `selective`: a matrix product costs far more to compute again than its output costs to keep.
_ATEN = torch.ops.aten
KEPT_OPS = [
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default, _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip


def checkpoint_activations(model: nn.Module, config: TrainConfig, keys: TokenKeys | None) -> None:
    """Wrap each decoder layer's forward, inside whatever gathers its parameters; names and hooks stay as they are.

    Args:
        keys: of layers that draw dropout masks: recomputation must see the tokens that forward saw.
    """
    if config.activation_checkpointing is Activations.none:
        return
    selective = config.activation_checkpointing is Activations.selective
    how: dict[str, Any] = {}
    if selective:
        how = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT_OPS), **bypassing_hooks()}
    for layer in decoder_layers(model):
        layer.forward = _checkpointed(layer.forward, how, config.activation_offload, keys)  # type: ignore[method-assign]


def _checkpointed(
    forward: Callable[..., Any], how: dict[str, Any], offload: bool, keys: TokenKeys | None
) -> Callable[..., Any]:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A compiled graph has the keys as an input, and its backward the same; it could not set them.
        reads = keys is None or torch.compiler.is_compiling()
        again = forward if reads else partial(keys.replay, forward, keys.get())  # type: ignore[union-attr]
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(again, *args, use_reentrant=False, **how, **kwargs)

    return run
