"""APIs of torch that are private, young or of some versions only: one list of every use, and what versions do differently.

`tests/trainer/test_torch_api.py` holds each use against signatures that were read from wheels of the oldest, the locked and the
newest supported version, and finds uses that are not listed. For another version: `python tests/trainer/read_torch.py WHEEL`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

OLDEST, NEWEST = "2.11", "2.14"  # pyproject.toml says the same


@dataclass(frozen=True)
class Use:
    """How a file uses something of torch.

    Attributes:
        name: where we import it from, or the way to a member.
        call: the parameters that we give: those by position under torch's names for them, in order, then those by keyword,
            with an `=`. None: it only has to be there.
        why: what is uncertain about it, and why nothing surer would do.
        since: the first version that has it, where that is not the oldest supported: it is asked for before it is used.
        ours: a method that we replace: torch calls it, and `call` is all that it may give.
    """

    name: str
    call: str | None
    why: str
    since: str = OLDEST
    ours: bool = False


_FSDP, _DCP, _RUN = "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed"
_NEW = "young: it has changed names and places before"
_OWN = "private: DCP has no public way for tensors that are boxes in memory of another"
_SUB = "a method that we replace: torch calls it so"
_TYPE = "a type in signatures of ours"
_KEPT = "an operator's name is nobody's promise, and a list with one that is missing fails at import"
_AGENT = "torchrun's own parts: its command would print tracebacks where the user's message must stand"

USES: dict[str, tuple[Use, ...]] = {  # by our file
    "trainer/torch_api.py": (
        Use("torch.utils.checkpoint.checkpoint", "function, use_reentrant=, respect_saved_tensors_hooks=",
            "2.14 warns of a change to come where it is not said", "2.14"),
        Use("torch.nn.attention.varlen.varlen_attn", "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=, window_size=",
            _NEW),
        Use("torch.nn.attention.varlen.varlen_attn", "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=",
            "2.11 computes grouped heads only where keys and values are repeated", "2.12"),
    ),
    "trainer/model/scorer.py": (
        Use("torch.overrides.TorchFunctionMode.__torch_function__", "self, func, types, args, kwargs", _SUB, ours=True),
    ),
    "trainer/model/activations.py": (
        Use("torch.utils.checkpoint.checkpoint", "function, use_reentrant=, context_fn=", _NEW),
        Use("torch.utils.checkpoint.create_selective_checkpoint_contexts", "policy_fn_or_list", _NEW),
        Use("torch.autograd.graph.save_on_cpu", "pin_memory=", _NEW),
        *(Use(f"torch.ops.aten.{name}.default", None, _KEPT) for name in (
            "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
        )),
    ),
    "trainer/model/layers.py": (
        Use("torch.nn.Module.compile", "self, dynamic=", _NEW),
        Use("torch._dynamo.config", None, "private: `torch.compile` has no option for it"),
        Use("torch._dynamo.config.specialize_float", None, "private: `torch.compile` has no option for it"),
    ),
    "trainer/parallel/distributed.py": (
        Use("torch.distributed.distributed_c10d._get_default_store", "",
            "private: waiting without a time limit needs the store that ranks met in, and none is handed out"),
        Use("torch.utils.deterministic._Deterministic.fill_uninitialized_memory", None,
            "a property that a module has got: a misspelt one would be set without a word"),
    ),
    "trainer/backends/local.py": (
        Use("torch.nn.parallel.DistributedDataParallel", "module, process_group=, broadcast_buffers=, gradient_as_bucket_view=",
            "2.13 deprecates `broadcast_buffers` for a name that 2.11 does not know"),
        Use("torch.nn.parallel.DistributedDataParallel.no_sync", "self", _NEW),
        Use("torch.nn.utils.get_total_norm", "tensors", _NEW),
        Use("torch.ops.aten._foreach_mul_.Scalar", None, "private: the public way to clip goes through each DTensor"),
    ),
    "trainer/backends/fsdp.py": (
        Use(f"{_FSDP}.fully_shard", "module, mesh=, mp_policy=, offload_policy=, reshard_after_forward=", _NEW),
        Use(f"{_FSDP}.register_fsdp_forward_method", "module, method_name", _NEW),
        Use(f"{_FSDP}.MixedPrecisionPolicy", "param_dtype, reduce_dtype", _NEW),
        Use(f"{_FSDP}.CPUOffloadPolicy", "pin_memory=", _NEW),
        Use(f"{_FSDP}.OffloadPolicy", "", _NEW),
        Use(f"{_FSDP}.FSDPModule", None, _NEW),
        Use(f"{_FSDP}.FSDPModule.set_requires_all_reduce", "self, requires_all_reduce", _NEW),
        Use(f"{_FSDP}.FSDPModule.set_requires_gradient_sync", "self, requires_gradient_sync", _NEW),
        Use(f"{_FSDP}.FSDPModule.set_modules_to_forward_prefetch", "self, modules", _NEW),
        Use(f"{_FSDP}.FSDPModule.set_modules_to_backward_prefetch", "self, modules", _NEW),
    ),
    "trainer/parallel/mesh.py": (
        Use("torch.distributed.device_mesh.DeviceMesh", None, _TYPE),
        Use("torch.distributed.device_mesh.init_device_mesh", "device_type, mesh_shape, mesh_dim_names=", _NEW),
    ),
    "trainer/parallel/shard.py": (
        Use("torch.distributed.tensor.DTensor", None, _NEW),
        Use("torch.distributed.tensor.DTensor._local_tensor", None,
            "private: `to_local()` is a node of autograd and may be a copy; a checkpoint is read into this memory"),
        Use("torch.distributed.tensor._utils.compute_local_shape_and_global_offset", "global_shape, mesh, placements",
            "private: uneven shards are torch's own arithmetic"),
        Use(f"{_DCP}.metadata.ChunkStorageMetadata", "offsets, sizes", _OWN),
        Use(f"{_DCP}.metadata.MetadataIndex", "fqn, offset", _OWN),
        Use(f"{_DCP}.metadata.TensorProperties.create_from_tensor", "tensor", _OWN),
        Use(f"{_DCP}.planner.TensorWriteData", "chunk, properties, size", _OWN),
        Use(f"{_DCP}.planner.WriteItem", "index, type, bytes_io_data, tensor_data", _OWN),
        Use(f"{_DCP}.planner.WriteItemType.SHARD", None, _OWN),
        Use("torch.distributed._checkpointable._Checkpointable.__create_write_items__", "self, fqn, object", _SUB, ours=True),
    ),
    "trainer/checkpoint/tensors.py": (
        Use(f"{_DCP}.save", "state_dict, storage_writer=, planner=, no_dist=, process_group=", _NEW),
        Use(f"{_DCP}.load", "state_dict, storage_reader=, planner=, no_dist=, process_group=", _NEW),
        Use(f"{_DCP}.DefaultSavePlanner", "flatten_state_dict, flatten_sharded_tensors", _NEW),
        Use(f"{_DCP}.DefaultSavePlanner.lookup_object", "self, index", _SUB, ours=True),
        Use(f"{_DCP}.DefaultLoadPlanner", "", _NEW),
        Use(f"{_DCP}.DefaultLoadPlanner.set_up_planner", "self, state_dict, metadata, is_coordinator", _SUB, ours=True),
        Use(f"{_DCP}.DefaultLoadPlanner.create_local_plan", "self", _SUB, ours=True),
        Use(f"{_DCP}.DefaultLoadPlanner.lookup_tensor", "self, index", _SUB, ours=True),
        Use(f"{_DCP}.HuggingFaceStorageReader", "path", _NEW),
        Use(f"{_DCP}.HuggingFaceStorageWriter", "path, save_distributed=", _NEW),
        Use(f"{_DCP}.HuggingFaceStorageWriter.write_data", "self, plan, planner", _SUB, ours=True),
        Use(f"{_DCP}.api.CheckpointException.failures", None, _NEW),
        Use(f"{_DCP}.planner.LoadPlan", "items", _OWN),
        Use(f"{_DCP}.planner.SavePlan.storage_data", None, _OWN),
        Use(f"{_DCP}.planner_helpers.create_read_items_for_chunk_list", "fqn, checkpoint_md, local_chunks", _OWN),
        Use(f"{_DCP}.SavePlanner", None, _TYPE),
        Use(f"{_DCP}.storage.WriteResult", None, _TYPE),
    ),
    "kernels/dropout.py": (
        Use("torch.library.custom_op", "name, mutates_args=", _NEW),
        Use("torch.library.CustomOpDef.register_fake", "self, fn", _NEW),
        Use("torch.library.CustomOpDef.register_autograd", "self, backward, setup_context=", _NEW),
    ),
    "kernels/rope.py": (
        Use("torch.autograd.function.once_differentiable", "fn", "not among the documented names"),
    ),
    "launch/processes.py": (
        Use("torch._inductor.compile_fx", None, "imported early to save time; nothing fails without"),
    ),
    "launch/agent.py": (
        Use(f"{_RUN}.run.parse_args", "args", _AGENT),
        Use(f"{_RUN}.run.config_from_args", "args", _AGENT),
        Use(f"{_RUN}.launcher.api.elastic_launch", "config=, entrypoint=", _AGENT),
        Use(f"{_RUN}.elastic.multiprocessing.errors.ChildFailedError.failures", None, _AGENT),
        Use(f"{_RUN}.elastic.multiprocessing.api.SignalException.sigval", None, _AGENT),
    ),
    "launch/supervise.py": tuple(Use(f"torch.distributed.run --{option}", None, _AGENT) for option in (
        "rdzv-backend", "rdzv-endpoint", "rdzv-id", "nnodes", "node-rank", "nproc-per-node", "max-restarts",
        "signals-to-handle",
    )),
}  # fmt: skip


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, *, scale: float | None, window: tuple[int, int]
) -> Tensor:  # fmt: skip
    """PyTorch's variable-length attention of documents in a row, with grouped heads on every version.

    2.11 takes as many heads of keys and values as of queries: they are repeated there, at a cost in memory.

    Args:
        query: [T, H, D], half precision; key, value: [T, G, D] with H a multiple of G.
        bounds: int32 [S + 1], where documents begin and the last one ends.
        longest: tokens of the longest document.
        window: how many tokens before and after its own a query sees, -1 for all.

    Returns:
        [T, H, D], in the dtype of `query`.
    """
    from torch.nn.attention import varlen  # imports Dynamo: seconds that only who attends so should pay

    function: Any = varlen.varlen_attn
    groups = query.shape[1] // key.shape[1]
    grouped = {}
    if groups > 1:
        if "enable_gqa" in (function.__kwdefaults__ or {}):
            grouped = {"enable_gqa": True}
        else:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return function(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, **grouped)


def bypassing_hooks() -> dict[str, bool]:
    """What tells `checkpoint` that tensors which a selection keeps stay on their device, whatever offloads the others.

    Every version does so; from 2.14 on it is to be said.
    """
    name = "respect_saved_tensors_hooks"
    return {name: False} if name in inspect.signature(checkpoint).parameters else {}
