"""Where the state lives. One loop drives every backend through the same few verbs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tritune.trainer.backends.local import Local
from tritune.trainer.backends.mixed import Mixed
from tritune.trainer.config import BackendConfig, Dtype
from tritune.trainer.distributed import World


class Backend(Protocol):
    """Gradients are averaged over `dp_size` ranks, so the loop scales each loss by `dp_size`."""

    name: str
    dp_rank: int
    dp_size: int
    device: torch.device
    world: World

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module: ...

    def sync(self, *, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients are reduced in the last one."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, max_norm: float, lr: float, refuse: bool = False) -> Tensor:
        """Clip, update, zero; return the gradient norm before clipping.

        Nothing is updated where the gradient is not finite, nor with `refuse` (the loss was not).
        """
        ...

    def sum(self, x: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that trains, and its optimizer state, by name, as views: a checkpoint is written from and read
        into these."""
        ...


def make_backend(config: BackendConfig, world: World, dtype: Dtype) -> Backend:
    """`auto` is `single` for one process and `ddp` for several."""
    name = config.name if config.name != "auto" else ("ddp" if world.size > 1 else "single")
    return Mixed(name, world) if dtype is Dtype.bfloat16 else Local(name, world)
