"""What a run trained, to be exported: its tensors are read when they are written, from its checkpoint and its base's files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from tritune.trainer.checkpoint.reader import TensorReader
from tritune.trainer.checkpoint.tensors import require_same_tensors
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Dtype
from tritune.trainer.export import Source
from tritune.trainer.methods.states import Read, whole
from tritune.trainer.model.by_module import logits_by_module
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.weights import Weights
from tritune.trainer.open import Opened, open_model
from tritune.trainer.parallel.box import Box
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of


def source_of(config: Config, run: Path, world: World, facts: dict[str, Any], read_back: bool = False) -> Source:
    """What a run trained, to be exported: masters are written, and what they must compute is asked of the model as
    training ran it.

    Where the base's files allow it the model has meta tensors, and one of its tensors or modules is read at a time; else
    (random weights, new tokens, a family that no test knows) it is in memory whole, and in bfloat16 once more as it computes.

    Args:
        facts: of the run's summary; left out where its scores are another step's.
        read_back: the run's own prompt is used, from its `config.yaml`.
    """
    opened = open_model(config, run, world, settle=False, sharded=True)
    if opened.weights is not None and not opened.weights.under_own_names():
        opened = open_model(config, run, world, settle=False)  # saved under the names that transformers read it by
    if facts and facts.get("tested_step") != opened.step:
        facts = {"step": opened.step}
    logits, read = _whole(config, run, world, opened) if opened.weights is None else _in_files(opened)
    return Source(
        opened.config, opened.model, logits, opened.tokenizer, opened.heads, opened.labels, facts, read_back, read
    )


def _whole(config: Config, run: Path, world: World, opened: Opened) -> tuple[Callable[[Tensor], Tensor], Read]:
    computes = opened.model
    if config.model.dtype is Dtype.bfloat16:
        computes = open_model(config, run, world).model
    return TokenScorer(computes, None, config.seed, 1).logits, whole


def _in_files(opened: Opened) -> tuple[Callable[[Tensor], Tensor], Read]:
    assert opened.weights is not None
    assert opened.saved is not None
    path, manifest = opened.saved
    trained = {f"model.{n}": shard_of(p) for n, p in opened.model.named_parameters() if p.requires_grad}
    require_same_tensors(path, trained, {n: e for n, e in manifest["tensors"].items() if n.startswith("model.")})
    model: Any = opened.model
    model._weight_conversions = []  # as transformers leaves it where it read files under the model's own names
    read = _reader(opened.model, opened.weights, TensorReader(path, manifest))
    dtype = getattr(torch, opened.config.model.dtype.value)
    return partial(logits_by_module, opened.model, read, dtype), read


def _reader(model: PreTrainedModel, base: Weights, checkpoint: TensorReader) -> Read:
    """From a meta tensor of `model` to its values: of the checkpoint where it trained, else of the base."""
    named = {id(p): (name, p.requires_grad) for name, p in model.named_parameters()}

    def read(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":  # a buffer
            return whole(tensor)
        name, trained = named[id(tensor)]
        if trained:
            return checkpoint.read(f"model.{name}")
        return base.read(name, Box((0,) * tensor.ndim, tuple(tensor.shape)))

    return read
