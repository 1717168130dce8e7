"""`zero1`, `zero2`, `zero3`: DeepSpeed's ZeRO engine under the one loop.

bf16 means what it means on FSDP2: forward and backward on bf16 copies, float32 masters and moments of what trains, float32
gradient accumulation and reduction. Clipping and the refusal of a gradient that is not finite are the engine's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tritune.trainer.backends.local import place_buffers, trainable
from tritune.trainer.backends.zero_engine import (
    discard_gradients,
    fragments,
    gather_with,
    make_engine,
    make_moments,
    partition,
    update_copies,
)
from tritune.trainer.config.backends import Offload, ZeroConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.model.optim import set_rate
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.distributed import ensure_group
from tritune.trainer.parallel.mesh import DATA, Mesh
from tritune.trainer.parallel.shard import Shard, fill


class Zero:
    """See `Backend`."""

    def __init__(self, config: ZeroConfig, mesh: Mesh, dtype: Dtype) -> None:
        self.name, self.mesh, self.config = config.name, mesh, config
        self.stage, self.bf16 = int(config.name[-1]), dtype is Dtype.bfloat16
        self.dp_rank, self.dp_size, self.device = mesh.rank(DATA), mesh.size(DATA), mesh.world.device
        self.whole = False

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], weights: Weights | None = None
    ) -> nn.Module:
        ensure_group(self.device)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        computes = torch.bfloat16 if self.bf16 else None
        # DeepSpeed makes masters from what it casts to bf16; theirs are these values, not those rounded.
        masters = weights
        if weights is None and self.bf16:
            masters = Weights({}, {name: p.detach() for name, p in trainable(model).items()})
        buffers = dict(model.named_buffers())
        settings = self._settings()
        if self.stage == 3:
            partition(model, settings, computes, weights)
            gather_with(model)
        self.engine = make_engine(model, make_optimizer(model), settings)
        place_buffers(model, buffers, self.device)
        self._trainable = trainable(model)
        make_moments(self.engine)
        if masters is not None:
            found = {n.removeprefix("model."): p for n, p in self.tensors().items() if n.startswith("model.")}
            fill(found, masters.read)
        return self.engine

    @contextmanager
    def sync(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> None:
        """The engine computes it in its step."""

    def step(self, max_grad_norm: float, lr: float, norm: float | None, refuse: bool = False) -> float:
        if refuse:
            self.forget()
            return math.inf
        self.engine.optimizer.clip_grad = max_grad_norm
        set_rate(self.engine.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def sum(self, x: Tensor) -> Tensor:
        return self.mesh.sum(x, over=DATA)

    def forget(self) -> None:
        discard_gradients(self.engine)

    def tensors(self) -> dict[str, Shard]:
        return fragments(self.engine, self._trainable)

    def refresh(self) -> None:
        update_copies(self.engine)

    def _settings(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.config.bucket_elements,
            "allgather_bucket_size": self.config.bucket_elements,
            "overlap_comm": self.config.overlap and self.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_scatter": True,
        }
        home = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.config.offload is not Offload.none:
            zero["offload_optimizer"] = home
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": self.config.bucket_elements,
                "stage3_param_persistence_threshold": self.config.persistence_elements,
                "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
            }
            if self.config.offload is Offload.all:
                zero["offload_param"] = home
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loop counts; one "step" here is one of ours
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,  # set to optim.max_grad_norm at each step
            "zero_optimization": zero,
            "bf16": {"enabled": self.bf16},
            "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the same torch AdamW as on every backend
            "steps_per_print": 2**62,
        }
