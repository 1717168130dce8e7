"""The decoder's blocks: what is sharded, compiled and checkpointed one by one."""

from __future__ import annotations

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the decoder: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` each decoder layer: one graph serves all, and what shards a layer stays outside of it."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)  # micro-batches have as many lengths as their rows
