"""The layers that a low-rank update goes on: Linear, and GPT-2's Conv1D, which is one with its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tritune.trainer.methods.states import Read
from tritune.trainer.model.quantized import Nf4Linear

LINEAR = (nn.Linear, Conv1D)


def features(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs, K and N, read off the layer and not its weight, which ZeRO-3 leaves flat and empty."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def read_weight(layer: nn.Module, read: Read) -> Tensor:
    """The layer's weight as it keeps it, dense and whole."""
    if isinstance(layer, Nf4Linear):
        return layer.dense(read(layer.nf4))
    return read(layer.weight)  # type: ignore[arg-type]


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """The layer's weight between [N, K] and as the layer keeps it, in either direction."""
    return weight.t() if isinstance(layer, Conv1D) else weight
