"""The layers that a low-rank update goes on: Linear, and GPT-2's Conv1D, which is one with its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


def features(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs, K and N, read off the layer and not its weight, which ZeRO-3 leaves flat and empty."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """The layer's weight between [N, K] and as the layer keeps it, in either direction."""
    return weight.t() if isinstance(layer, Conv1D) else weight
