"""PyTorch FSDP2 (`fully_shard`): `fsdp` over all ranks, `hsdp` on a mesh of replicas x shards, and bfloat16 everywhere else.

What bf16 means here, as on every backend: forward and backward run on bf16 copies of all parameters, without autocast;
the trainable ones have float32 masters and moments; gradients are accumulated and reduced in float32; a frozen base is
bf16 only. FSDP2's mixed-precision policy does exactly this, so `single` and `ddp` in bf16 are meshes of shape (1) and
(world, 1), whose shards are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from tritune.trainer.backends.local import Local, hub_name, place_buffers, trainable
from tritune.trainer.config.backends import Accumulate, BackendConfig, FsdpConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.model.layers import decoder_layers, idle_modules
from tritune.trainer.model.optim import make_state
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.mesh import Mesh
from tritune.trainer.parallel.shard import fill, shard_of


class Fsdp(Local):
    """See `Backend`. The verbs that differ from `Local`'s."""

    def __init__(self, name: str, config: BackendConfig, mesh: Mesh, dtype: Dtype, order: int = 0) -> None:
        super().__init__(name, mesh, order)
        self.config = config if isinstance(config, FsdpConfig) else FsdpConfig()
        bf16 = dtype is Dtype.bfloat16
        self.policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        self.whole = name in ("single", "ddp")

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], weights: Weights | None = None
    ) -> nn.Module:
        self.model = self.place(model, weights)
        self._trainable = trainable(model)
        self.optimizer = make_optimizer(model)
        make_state(self.optimizer)
        return self.model

    def place(self, model: nn.Module, weights: Weights | None = None) -> nn.Module:
        mesh, offload = self.mesh.data_devices, OffloadPolicy()
        if self.config.offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        layers = decoder_layers(model)
        # In place; what no layer holds, embeddings and head among it, is the root's. What never runs is a group of its own,
        # or the root would gather it with every forward.
        for module in [*layers, *idle_modules(model), model]:
            fully_shard(
                module, mesh=mesh, mp_policy=self.policy, offload_policy=offload,
                reshard_after_forward=self.config.reshard_after_forward,
            )  # fmt: skip
        self._prefetch([m for m in layers if isinstance(m, FSDPModule)])
        self._settle(model, weights)
        for name in ("generate", "logits"):  # else they would meet parameters that are not gathered
            register_fsdp_forward_method(model, name)
        return model

    @contextmanager
    def sync(self, *, last: bool) -> Iterator[None]:
        """Reduce-scatter every micro-batch, all-reduce between replicas in the last one.

        Left to the last one, the reduction would make FSDP2 hold the whole gradient on each rank.
        """
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_all_reduce(last)
        if self.config.accumulate is Accumulate.unsharded:
            self.model.set_requires_gradient_sync(last)
        yield

    def _prefetch(self, layers: list[FSDPModule]) -> None:
        for i, layer in enumerate(layers):
            ahead, behind = layers[i + 1 : i + 1 + self.config.prefetch], layers[max(i - self.config.prefetch, 0) : i]
            layer.set_modules_to_forward_prefetch(ahead)
            layer.set_modules_to_backward_prefetch(behind[::-1])

    def _settle(self, model: nn.Module, weights: Weights | None) -> None:
        """Put parameters and buffers where they belong; with `weights`, give this rank's parts their values."""
        home = torch.device("cpu") if self.config.offload else self.device
        buffers = dict(model.named_buffers())
        if weights is not None:
            model.to_empty(device=home)
            fill({hub_name(n): shard_of(p) for n, p in model.named_parameters()}, weights.read)
        place_buffers(model, buffers, self.device)  # to_empty has emptied them
