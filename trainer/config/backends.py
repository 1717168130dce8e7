"""The `backend` group: where the state lives, and the few knobs of each that matter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Accumulate(StrEnum):
    """Between micro-batches FSDP2 keeps this rank's part of the gradient, reduced each time, or the whole of it, reduced
    once: less communication for 4 bytes a parameter on every rank."""

    sharded = "sharded"
    unsharded = "unsharded"


class Offload(StrEnum):
    """What ZeRO keeps in host memory: nothing, masters and moments, or (stage 3) the parameters as well."""

    none = "none"
    optimizer = "optimizer"
    all = "all"


@dataclass
class BackendConfig:
    name: str = "auto"  # where the state lives; auto: single for one process, ddp for several
    device: Device = Device.auto  # auto: the GPU where there is one
    timeout_seconds: int = 1800  # a collective that waits longer fails the run
    join_seconds: float = 20.0  # seconds after which a rank that has not joined counts as dead


@dataclass
class FsdpConfig(BackendConfig):
    """PyTorch FSDP2, `fully_shard` on each decoder layer; embeddings and head are the root's."""

    name: str = "fsdp"
    reshard_after_forward: bool = True  # free a layer's parameters between its forward and its backward
    prefetch: int = 1  # layers gathered ahead of the one that computes
    accumulate: Accumulate = Accumulate.sharded
    offload: bool = False  # parameters, gradients and moments in host memory; the update is computed there


@dataclass
class HsdpConfig(FsdpConfig):
    """FSDP2 on a mesh of replicas x shards: sharded within a group of ranks, replicated between the groups. Beside its own
    key it takes those of `backend=fsdp`."""

    name: str = "hsdp"
    shards: int | None = None  # ranks that share one copy; default: those of a machine, or half of them where it is one


@dataclass
class ZeroConfig(BackendConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): stage 1 shards moments and masters, 2 gradients too,
    3 parameters too."""

    name: str = "zero3"
    offload: Offload = Offload.none
    bucket_elements: int = 50_000_000  # elements reduced, or gathered, in one collective
    overlap: bool = True  # reduce while backward goes on, where there are streams for it
    persistence_elements: int = 100_000  # stage 3: parameters up to this size stay gathered


def hsdp_shards(config: HsdpConfig, size: int, local_size: int) -> int | None:
    """Ranks that share one copy: as configured; else those of a machine; on one machine its largest share that leaves two.

    None where `size` ranks make no such groups. Of one or two ranks there is one group.
    """
    shards = config.shards
    if shards is None:
        shares = [n for n in range(2, size // 2 + 1) if size % n == 0]
        shards = local_size if local_size < size else (size if size <= 2 else max(shares, default=0))
    return shards if shards and size % shards == 0 else None
