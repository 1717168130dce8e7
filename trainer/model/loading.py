"""A model as its backend wants it: whole, or of meta tensors beside the files that hold its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import ModelConfig
from tritune.trainer.model.load import load_model
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.weights import Weights


def load(
    config: ModelConfig, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None,
    seed: int, dtype: torch.dtype, sharded: bool, say: Callable[[str], None],
) -> tuple[PreTrainedModel, Weights | None]:  # fmt: skip
    """Return the model, and where its values are if it is one of meta tensors. Arguments as of `load.load_model`.

    Args:
        sharded: whether each rank computes from a part of the parameters, so that none need load them whole.
    """
    args = (config, architecture, tokenizer, labels, seed, dtype)
    if sharded:
        found = load_meta_model(*args)
        if not isinstance(found, str):
            return found
        say(f"model     each rank loads it whole before it is sharded: {found}")
    return load_model(*args), None
