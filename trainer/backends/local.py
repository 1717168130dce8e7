"""`single` and `ddp`: a whole model on each rank, gradients averaged between them (PyTorch DistributedDataParallel)."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tritune.trainer.model.optim import make_state, set_rate
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.mesh import DATA, SHARD, Mesh
from tritune.trainer.parallel.shard import Shard, shard_of


class Local:
    """See `Backend`. With one rank there is no wrapper at all.

    Args:
        order: 0, or the number of a random order in which the gradient norm is summed (`verify.order`).
    """

    def __init__(self, name: str, mesh: Mesh, order: int = 0) -> None:
        self.name, self.mesh, self.order, self.whole = name, mesh, order, True
        self.dp_rank, self.dp_size, self.device = mesh.rank(DATA), mesh.size(DATA), mesh.world.device

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], weights: Weights | None = None
    ) -> nn.Module:
        self.model: nn.Module = self.place(model, weights)
        self._trainable = trainable(model)
        self.optimizer = make_optimizer(model)
        make_state(self.optimizer)
        if self.dp_size > 1:
            # Buffers hold nothing that trains. Gradients as views of the buckets save one copy of the gradients.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # renamed in torch 2.13, same meaning
                self.model = DistributedDataParallel(
                    model, process_group=self.mesh.group(DATA), broadcast_buffers=False, gradient_as_bucket_view=True
                )
        return self.model

    def place(self, model: nn.Module, weights: Weights | None = None) -> nn.Module:
        """Put the model where it computes, and return what is called in its place: all that a model to be read needs."""
        assert weights is None, "a model of meta tensors is placed by a backend that shards it"
        return model.to(self.device)

    def sync(self, *, last: bool) -> AbstractContextManager:
        # DDP reads the flag in forward, so the context must hold both passes.
        return nullcontext() if last or self.dp_size == 1 else self.model.no_sync()  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grad_norm(self) -> Tensor:
        # Over local shards: a DTensor's norm is a launch and a reduction for each parameter.
        gradients = self._gradients()
        if self.order:
            gradients = random.Random(self.order).sample(gradients, len(gradients))
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device, torch.float64)
        if self.mesh.size((SHARD,)) == 1:
            return norm
        return self.mesh.sum(norm.square(), over=(SHARD,)).sqrt()

    def step(self, max_grad_norm: float, lr: float, norm: float | None, refuse: bool = False) -> float:
        assert norm is not None, "grad_norm gave one"
        # It is the same number on all ranks, so each decides alike without asking the others.
        if math.isfinite(norm) and not refuse:
            factor = max_grad_norm / (norm + 1e-6)
            if factor < 1.0:
                torch.ops.aten._foreach_mul_.Scalar(self._gradients(), factor)
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.dp_size == 1)
        return norm

    def _gradients(self) -> list[Tensor]:
        """This rank's part of each gradient."""
        found = [p.grad for p in self._trainable.values() if p.grad is not None]
        return [g.to_local() if isinstance(g, DTensor) else g for g in found]

    def sum(self, x: Tensor) -> Tensor:
        return self.mesh.sum(x, over=DATA)

    def forget(self) -> None:
        for parameter in self._trainable.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Shard]:
        found: dict[str, Shard] = {}
        for name, parameter in self._trainable.items():
            found[f"model.{name}"] = shard_of(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"optim.{name}.{key}"] = shard_of(value)
        return found

    def refresh(self) -> None:
        """What computes is what was read."""


def trainable(scorer: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by its name in the Hugging Face model."""
    return {hub_name(name): p for name, p in scorer.named_parameters() if p.requires_grad}


def place_buffers(model: nn.Module, buffers: dict[str, Tensor], device: torch.device) -> None:
    """Put `buffers` back into `model`, on `device`: nothing shards or casts them, whatever it does to parameters."""
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer.to(device))


def hub_name(name: str) -> str:
    """A parameter's name in the Hugging Face model: the scorer around it (`model.`) is no part of a checkpoint."""
    return name.removeprefix("model.")
