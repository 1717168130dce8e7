"""Where the state lives. One loop drives every backend through the same few verbs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tritune.trainer.backends.fsdp import Fsdp
from tritune.trainer.backends.local import Local
from tritune.trainer.config.backends import BackendConfig, FsdpConfig, Offload, ZeroConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.mesh import DATA, Mesh, make_mesh
from tritune.trainer.parallel.shard import Shard


class Backend(Protocol):
    """Gradients are averaged over `dp_size` ranks, so the loop scales each loss by `dp_size`.

    These are the ranks along the mesh's axes of data, among which a step's rows are dealt out.
    """

    name: str
    dp_rank: int
    dp_size: int
    device: torch.device
    mesh: Mesh
    whole: bool  # whether the model on this rank holds all masters; else a checkpoint is the way to read them

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], weights: Weights | None = None
    ) -> nn.Module:
        """Take the model over and return what is called in its place.

        Args:
            weights: where a model of meta tensors has its values; each rank reads its part. None: the model is whole.
        """
        ...

    def sync(self, *, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients are reduced in the last one."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def grad_norm(self) -> Tensor | None:
        """The norm of the whole gradient, float64 [] on the device, which is not waited for; None where only `step` knows it."""
        ...

    def step(self, max_grad_norm: float, lr: float, norm: float | None, refuse: bool = False) -> float:
        """Clip, update, zero; return the gradient norm before clipping.

        Nothing is updated where the gradient is not finite, nor with `refuse` (the loss was not).

        Args:
            norm: what `grad_norm` gave, brought to the host with other figures in one copy.
        """
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the `dp_size` ranks."""
        ...

    def forget(self) -> None:
        """Drop the gradients."""
        ...

    def tensors(self) -> dict[str, Shard]:
        """This rank's part of everything that trains, masters and moments, by name: a checkpoint is written from and
        read into these views. The names are the same on all ranks."""
        ...

    def refresh(self) -> None:
        """Bring what computes in line with `tensors()`, after they were read."""
        ...


def make_backend(config: BackendConfig, mesh: Mesh, dtype: Dtype, order: int = 0) -> Backend:
    """`auto` is `single` for one process and `ddp` for several.

    Args:
        order: `verify.order`, for the reference of a proof.

    Raises:
        ValueError: ZeRO on a mesh with axes that are not of data: its engine takes all processes for those of data.
    """
    name = config.name if config.name != "auto" else ("ddp" if mesh.world.size > 1 else "single")
    if isinstance(config, ZeroConfig):
        if mesh.size(DATA) != mesh.world.size:
            raise ValueError(f"{name} averages gradients over all processes, and the mesh is {mesh.axes}")
        from tritune.trainer.backends.zero import Zero  # deepspeed takes a second to import

        return Zero(config, mesh, dtype)
    if isinstance(config, FsdpConfig) or dtype is Dtype.bfloat16:
        return Fsdp(name, config, mesh, dtype, order)
    return Local(name, mesh, order)


def make_reader(config: BackendConfig, world: World, dtype: Dtype) -> Local:
    """The backend of a model that is only read: whole on each rank, or in FSDP2's shards where the run shards parameters.

    ZeRO's engine shards a model together with its optimizer; what it trained computes the same in either layout.
    """
    mesh = make_mesh(config, world)
    if world.size == 1:
        return Local("single", mesh)
    if isinstance(config, FsdpConfig):
        return Fsdp(config.name, config, mesh, dtype)
    if isinstance(config, ZeroConfig) and shards_parameters(config):
        return Fsdp("fsdp", FsdpConfig(offload=config.offload is Offload.all), mesh, dtype)
    return Local("ddp", mesh)


def shards_parameters(config: BackendConfig) -> bool:
    """Whether each rank computes from a part of the parameters, so that none need load them whole."""
    return isinstance(config, FsdpConfig) or config.name == "zero3"
