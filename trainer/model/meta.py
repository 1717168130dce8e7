"""A model without values: its parameters are meta tensors, so that no rank ever holds them all.

The backend shards it and each rank reads its own part from the safetensors. Buffers, and what is new (a classifier's head),
are small and real.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import reason
from tritune.trainer.model.generation_config import read_generation
from tritune.trainer.model.load import CLASS_HEAD, settle_architecture
from tritune.trainer.model.reached import reaches_everything
from tritune.trainer.model.weights import Weights, find_weights


def load_meta_model(
    config: ModelConfig,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    seed: int,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, Weights] | str:
    """Return the model with meta parameters and where their values are; or why it must be loaded whole.

    Arguments as of `load.load_model`.

    Raises:
        InputError: there are no safetensors to read.
    """
    if config.config:
        return "random weights are drawn in one order"
    if len(tokenizer) > architecture.get_text_config().vocab_size:
        return "new embeddings are drawn from the whole matrix"
    if not reaches_everything(architecture):
        return f"{architecture.model_type} is no family that the tests know, and is looked at when it is loaded"
    auto = settle_architecture(architecture, tokenizer, labels)
    try:
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(architecture, attn_implementation=config.attention.value, dtype=dtype)
    except Exception as error:  # noqa: BLE001  whatever it is, loading whole meets it too, and says it with its remedy
        return reason(error)
    read_generation(model, config)
    model.tie_weights()  # each parameter was replaced by a meta one of its own
    head = getattr(model, CLASS_HEAD, None) if labels is not None else None
    if labels is not None and not isinstance(head, nn.Linear):
        return "its classification head is not one linear layer"
    skip = {f"{CLASS_HEAD}.{name}" for name, _ in head.named_parameters()} if head is not None else set()
    found = find_weights(config, model, skip)
    if head is not None:
        head.to_empty(device="cpu")
        torch.manual_seed(seed)
        model._init_weights(head)
    return found if isinstance(found, str) else (model, found)
