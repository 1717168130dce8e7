"""A model as its backend wants it: whole, or of meta tensors beside the files that hold its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.choices import Storage
from tritune.trainer.model.load import CLASS_HEAD, load_model
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.quantized import Quantized, fill_whole, quantize_layers, quantized_layers
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
    packed, heads = config.storage is Storage.nf4, [CLASS_HEAD] if labels is not None else []
    if sharded or packed:
        found = load_meta_model(*args)
        if not isinstance(found, str):
            model, weights = found
            if packed:
                quantize_layers(model, heads)
                _say_packed(model, say)
                weights = Quantized(weights, {n: layer.shape for n, layer in quantized_layers(model).items()})
            if not sharded:
                fill_whole(model, weights)
            return model, weights if sharded else None
        what = " and ".join(["quantised"] * packed + ["sharded"] * sharded)
        say(f"model     each rank loads it whole before it is {what}: {found}")
    model = load_model(*args)
    if packed:
        quantize_layers(model, heads)
        _say_packed(model, say)
    return model, None


def _say_packed(model: PreTrainedModel, say: Callable[[str], None]) -> None:
    layers = quantized_layers(model)
    packed = sum(layer.shape.numel() for layer in layers.values())
    rest = sum(p.numel() for p in model.parameters() if p.ndim > 2)
    stays = f"; {rest:,} parameters of experts are no linear layers and stay as they are" if rest else ""
    say(f"model     nf4 holds {len(layers):,} linear layers, {packed:,} parameters, in 4.13 bits each{stays}")
