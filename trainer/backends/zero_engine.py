"""DeepSpeed's engine, and the private names of it that we need: all of them are in this file (tested with 0.19.8).

State is read and written through rank-local fragments: no collective, no whole tensor. What is private and why:
- stage 1 with float32 accumulation of bf16 gradients would take another class, `BF16_Optimizer`: one sanity check decides;
- `zero.Init` broadcasts each parameter whole; here every rank has, or reads, its own part;
- the extension that it compiles on CPU;
- fragments: `_hp_mapping` on stages 1 and 2, `grad_position` into flat partitions on 3.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tritune.trainer.backends.local import hub_name
from tritune.trainer.model.optim import make_state
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.shard import Shard, fill, shard_of, shard_of_run

# Some forty lines a rank at start; what goes wrong is an exception.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402


class _Engine(DeepSpeedEngine):
    """The engine, with one optimizer class for stages 1 and 2."""

    def _do_optimizer_sanity_check(self, basic_optimizer):
        super()._do_optimizer_sanity_check(basic_optimizer)
        return "zero_optimization"


class _Partitioner(deepspeed.zero.Init):
    """`zero.Init` without its broadcast of every whole parameter from rank 0."""

    def _zero_init_param(self, param):
        self._convert_to_deepspeed_param(param)
        param.partition()


# DeepSpeed calls these by their old names, twice a layer, and on CPU each call would warn.
warnings.filterwarnings("ignore", r".*`torch\.distributed\.\w+` is deprecated", FutureWarning)


# On CPU it would compile an extension for inference, which training never calls: a compiler, a minute, and a lock on a shared
# folder that a killed run leaves behind and every later one waits for.
# By its full name: the attribute `deepspeed.comm.torch` is torch itself.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _join() -> None:
    """Let DeepSpeed take over torch's process group."""
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)


def make_engine(model: nn.Module, optimizer: Optimizer, settings: dict[str, Any]) -> DeepSpeedEngine:
    """What `deepspeed.initialize` does, for `_Engine`."""
    _join()
    return _Engine(
        args=None, model=model, optimizer=optimizer, config=settings, config_class=DeepSpeedConfig(settings),
        dont_change_device=False,
    )  # fmt: skip


def partition(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype | None, weights: Weights | None) -> None:
    """Stage 3: leave each rank its part of every parameter; meta parameters get theirs from `weights`.

    One parameter at a time is whole for a moment, and on CPU as untouched memory only.

    Args:
        dtype: to compute in; None keeps each parameter's own.
    """
    _join()
    convert = _Partitioner(config_dict_or_path=settings)
    names = {id(p): hub_name(n) for n, p in model.named_parameters()}
    done: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for module in list(model.modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                done[id(parameter)] = _partitioned(parameter, convert, dtype, names[id(parameter)], weights)
            setattr(module, key, done[id(parameter)])


def gather_with(model: nn.Module) -> None:
    """Stage 3: gather the parameters of modules in the hooks of the block that computes them (`kernels.install`); their
    own never run.

    Not by `set_z3_leaf_module`: a leaf's gradients are reduced when its input's gradient is there, and before they exist
    where the input needs none, as in the first layer under LoRA.
    """
    for block in model.modules():
        for parameter in (p for module in getattr(block, "computes", ()) for p in module.parameters()):
            deepspeed.zero.register_external_parameter(block, parameter)


def _partitioned(
    parameter: nn.Parameter, convert: _Partitioner, dtype: torch.dtype | None, name: str, weights: Weights | None
) -> nn.Parameter:
    whole = parameter.detach() if weights is None else torch.empty_like(parameter, device=convert.local_device)
    new: Any = nn.Parameter(
        whole.to(dtype if dtype is not None and whole.is_floating_point() else whole.dtype),
        requires_grad=parameter.requires_grad,
    )
    convert._convert_to_zero_parameters([new])
    if weights is not None:
        start, length = _place(new, convert.rank)
        fill({name: shard_of_run(new.ds_shape, start, new.ds_tensor[:length])}, weights.read)
    return new


def _place(parameter: Any, rank: int) -> tuple[int, int]:
    """Where a rank's partition of a stage 3 parameter begins, and its length; the last partitions may end in padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def make_moments(engine: DeepSpeedEngine) -> None:
    """`make_state` for the optimizer of the shards; stage 3 shows it a sub-group's parameters only while that is updated."""
    optimizer = engine.optimizer
    groups = optimizer.optimizer.param_groups
    shown = [group["params"] for group in groups]
    if _stage(engine) == 3:
        for group in groups:
            group["params"] = []
        for index, flat in enumerate(_flat_masters(engine)):
            groups[optimizer.sub_group_to_group_id[index]]["params"].append(flat)
    make_state(optimizer.optimizer)
    for group, parameters in zip(groups, shown, strict=True):
        group["params"] = parameters


def fragments(engine: DeepSpeedEngine, parameters: dict[str, nn.Parameter]) -> dict[str, Shard]:
    """Masters and optimizer state of `parameters`, this rank's part of each."""
    optimizer = engine.optimizer
    if _stage(engine) < 3:
        # Only the first parameter group is linked after the first step; without this the owners of the others raise.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    find = _partition_of if _stage(engine) == 3 else _fragment_of
    found: dict[str, Shard] = {}
    for name, parameter in parameters.items():
        shape, start, master, state = find(engine, parameter)
        found[f"model.{name}"] = shard_of_run(shape, start, master)
        for key, values in state.items():
            found[f"optim.{name}.{key}"] = shard_of_run(shape, start, values) if values.ndim else shard_of(values)
    return found


# A parameter's shape, where this rank's run of its elements begins, the run's masters, and its optimizer state.
Found = tuple[torch.Size, int, Tensor, dict[str, Tensor]]


def _fragment_of(engine: DeepSpeedEngine, parameter: Any) -> Found:
    """Stages 1 and 2: what of a parameter lies in this rank's partition of its group, which may be nothing."""
    link, states = parameter._hp_mapping, engine.optimizer.optimizer.state
    if link is None:
        state, nothing = states[_flat_masters(engine)[0]], torch.empty(0, dtype=torch.float32)
        return parameter.shape, 0, nothing, {key: nothing if v.ndim else v for key, v in state.items()}
    state = states[_flat_masters(engine)[link.param_group_index]]
    values = {key: link.get_optim_state_fragment(key) if v.ndim else v for key, v in state.items()}
    return parameter.shape, link.lp_fragment_address.start, link.hp_fragment.detach(), values


def _partition_of(engine: DeepSpeedEngine, parameter: Any) -> Found:
    """Stage 3: this rank's partition of a parameter, in the flat partition of its sub-group."""
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    start, length = _place(parameter, optimizer._get_param_partition_rank(parameter))
    state, length = optimizer.optimizer.state[flat], min(length, size)
    values = {key: v.narrow(0, offset, length) if v.ndim else v for key, v in state.items()}
    return parameter.ds_shape, start, flat.detach().narrow(0, offset, length), values


def update_copies(engine: DeepSpeedEngine) -> None:
    """Make the parameters that compute follow the masters."""
    optimizer = engine.optimizer
    if _stage(engine) < 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def discard_gradients(engine: DeepSpeedEngine) -> None:
    """Forget what was accumulated since the last step, as the engine does where it refuses one."""
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    if _stage(engine) == 3:
        optimizer.averaged_gradients = {}
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        return
    optimizer.micro_step_id = -1
    optimizer._epilogue_ran_this_backward = False
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    for group in range(len(optimizer.bit16_groups)):
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def _stage(engine: DeepSpeedEngine) -> int:
    return engine.zero_optimization_stage()


def _flat_masters(engine: DeepSpeedEngine) -> list[Tensor]:
    optimizer = engine.optimizer
    if _stage(engine) == 3:
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups
