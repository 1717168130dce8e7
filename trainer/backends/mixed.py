"""bfloat16 on `single` and `ddp`, through PyTorch's FSDP2 on meshes of shape (1) and (world, 1).

What bf16 means here, as on every backend: forward and backward run on bf16 copies of all parameters, without autocast;
the trainable ones have float32 masters and moments; gradients are accumulated and reduced in float32; a frozen base is
bf16 only. FSDP2's mixed-precision policy does exactly this, so a mesh whose shards are whole gives it to one process, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from tritune.trainer.backends.local import Local, trainable


class Mixed(Local):
    """See `Backend`. The verbs that differ from `Local`'s."""

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module:
        if not dist.is_initialized():  # a mesh needs a process group, even of one
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model.to(self.device)
        if self.dp_size == 1:
            mesh = init_device_mesh(self.device.type, (1,))
        else:
            mesh = init_device_mesh(self.device.type, (self.dp_size, 1), mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # in place
        for name in ("generate", "logits"):  # else they would meet parameters that are not gathered
            register_fsdp_forward_method(model, name)
        self.model = model
        self._trainable = trainable(model)
        self.optimizer = make_optimizer(model)
        self._make_moments()
        return self.model

    @contextmanager
    def sync(self, *, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        if self.dp_size > 1:
            self.model.set_requires_all_reduce(last)
        yield


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the decoder: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])
