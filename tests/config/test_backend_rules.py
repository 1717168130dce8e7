"""What a backend cannot do is refused by name, before anything is loaded."""

from __future__ import annotations

import pytest
from tritune.trainer.config.backends import HsdpConfig, hsdp_shards
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.schema import names
from tritune.trainer.errors import ConfigFaults

RUN = ["model=tiny", "data.train=rows.jsonl", "train.max_steps=1"]

REFUSED = [
    (["backend=zero3", "train.compile=true"], 2, "train.compile=True: ZeRO-3 gathers parameters in hooks"),
    (["backend=zero2", "model.dtype=float64"], 2, "model.dtype=float64: DeepSpeed keeps no float64"),
    (["backend=zero1", "backend.offload=all"], 2, "backend.offload=all: zero1 keeps all parameters"),
    (["backend=zero2", "backend.bucket_elements=3"], 2, "backend.bucket_elements=3"),
    (["backend=zero3", "backend.persistence_elements=-1"], 2, "backend.persistence_elements=-1"),
    (["backend=fsdp", "backend.prefetch=-1"], 2, "backend.prefetch=-1"),
    (["backend=hsdp"], 3, "backend.shards=None: 3 ranks cannot be split"),
    (["backend=hsdp"], 7, "backend.shards=None: 7 ranks cannot be split"),
    (["backend=hsdp", "backend.shards=3"], 4, "backend.shards=3: 4 ranks cannot be split"),
    (["train.activation_offload=true"], 1, "train.activation_offload=True: it moves what full checkpointing keeps"),
    (["train.activation_checkpointing=full", "model.dtype=float64"], 1, "train.activation_checkpointing=full"),
    (["train.compile=true", "model.dtype=float64"], 1, "train.compile=True: model.dtype=float64"),
    (["train.compile=true", "train.activation_checkpointing=full", "train.activation_offload=true"], 1,
     "train.activation_offload"),
    (["backend=single"], 2, "backend.name=single: 2 processes"),
    (["backend=ddp", "backend.offload=true"], 2, "backend.offload"),  # a key of other backends
    (["backend=zero2", "backend.shards=2"], 2, "backend.shards"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"), REFUSED, ids=lambda x: "-".join(x) if isinstance(x, list) else None
)
def test_refused(overrides, world_size, message):
    with pytest.raises(ConfigFaults) as error:
        load_config([*RUN, *overrides], None, world_size)
    assert message in str(error.value)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize("name", names()["backend"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_override_is_enough(name, method):
    config = load_config([*RUN, f"method={method}", f"backend={name}"], None, 1 if name == "single" else 4)
    assert config.backend.name == name


@pytest.mark.parametrize(
    ("shards", "size", "local_size", "expected"),
    [
        (None, 1, 1, 1), (None, 2, 2, 2), (None, 4, 4, 2), (None, 8, 8, 4), (None, 6, 6, 3), (None, 9, 9, 3),
        (None, 16, 8, 8), (None, 5, 5, None), (2, 8, 8, 2), (8, 8, 8, 8), (3, 8, 8, None), (1, 4, 4, 1),
    ],
)  # fmt: skip
def test_shards(shards, size, local_size, expected):
    assert hsdp_shards(HsdpConfig(shards=shards), size, local_size) == expected
