"""Bottleneck adapters on the blocks of each decoder layer (Houlsby et al. 2019, arXiv 1902.00751; He et al. 2021, 2110.04366)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter import Activation, AdapterConfig, Placement
from tritune.trainer.methods.patterns import kinds, matches
from tritune.trainer.methods.states import Read
from tritune.trainer.methods.token_keys import TokenKeys, layer_id_of
from tritune.trainer.model.layers import decoder_layers

# What families call these blocks of a decoder layer.
PLACES = {
    "attention": ("self_attn", "attn", "attention", "self_attention", "linear_attn"),
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe"),
}
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.relu: nn.functional.relu,
    Activation.gelu: nn.functional.gelu,
    Activation.silu: nn.functional.silu,
    Activation.tanh: torch.tanh,
}


class AdaptedBlock(nn.Module):
    """A frozen block f and a bottleneck: f(x) + scale * up(drop(act(down(h)))), h = f(x) in series and h = x in parallel.

    Args:
        base_layer: the block; takes [..., K] first or as `hidden_states`, returns [..., N] alone or first of several.
        width: of h; K in parallel, N in series. out: N.
        size, placement, activation, scale, dropout: as in `AdapterConfig`.
        layer_id: the block's number for dropout.
        keys: says which tokens the input holds.
    """

    def __init__(
        self, base_layer: nn.Module, config: AdapterConfig, width: int, out: int, layer_id: int, keys: TokenKeys
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(next(base_layer.parameters()).dtype, torch.float32)
        self.base_layer = base_layer
        self.adapter_down = nn.Linear(width, config.size, dtype=dtype)
        self.adapter_up = nn.Linear(config.size, out, dtype=dtype)
        self.activation, self.parallel = _ACTIVATIONS[config.activation], config.placement is Placement.parallel
        self.scale, self.p, self.layer_id, self.keys = config.scale, config.dropout, layer_id, keys

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.parallel:
            return self._add(self.base_layer(*args, **kwargs), None)
        # A node of the graph for both uses of x, and one for those within the block: gradients are added block by block, as
        # ZeRO-3's hooks make it. In bf16 another order of these sums is another rounding.
        x = args[0] if args else kwargs["hidden_states"]
        x = x.view_as(x)
        inner = x.view_as(x)
        args, kwargs = ((inner, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inner})
        return self._add(self.base_layer(*args, **kwargs), x)

    def _add(self, output: Any, x: Tensor | None) -> Any:
        """The block's output, or the first of its outputs, and what the bottleneck makes of `x` or of that."""
        first = output[0] if isinstance(output, tuple) else output
        narrow = self.activation(self.adapter_down(first if x is None else x))
        if self.p and self.training:
            narrow = self.keys.dropout(narrow, self.layer_id, self.p)
        total = first + self.scale * self.adapter_up(narrow)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def reset(self, seed: int) -> None:
        """Down uniform as in Linear, all else zero: what is added starts at 0. Values depend on (seed, layer_id) alone."""
        generator = torch.Generator().manual_seed((seed * 0x9E3779B9 + self.layer_id) % 2**63)
        bound = 1.0 / math.sqrt(self.adapter_down.in_features)
        with torch.no_grad():
            self.adapter_down.weight.uniform_(-bound, bound, generator=generator)
            for parameter in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
                parameter.zero_()


def add_bottlenecks(
    config: AdapterConfig, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str] = ()
) -> TokenKeys | None:
    """Freeze `model`, put a bottleneck on each block that `where` names, and release the new heads.

    Args:
        unused: parameters that take no part in the loss: a block of such alone gets none.

    Raises:
        InputError: an entry of `where` names no block, or none that takes part in the loss.
    """
    names = block_names(config, model, unused)
    hidden = int(model.config.get_text_config().hidden_size)
    model.requires_grad_(False)
    keys = TokenKeys()
    for name in names:
        block = model.get_submodule(name)
        k, n = (block.in_features, block.out_features) if isinstance(block, nn.Linear) else (hidden, hidden)
        width = k if config.placement is Placement.parallel else n
        adapted = AdaptedBlock(block, config, width, n, layer_id_of(name), keys)
        adapted.reset(seed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted)
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    return keys if config.dropout else None


def block_names(config: AdapterConfig, model: PreTrainedModel, unused: Collection[str] = ()) -> list[str]:
    """Names of the blocks that get a bottleneck, in the model's order. Arguments and errors as of `add_bottlenecks`."""
    layers = set(decoder_layers(model))
    blocks = {
        f"{name}.{child}": module
        for name, layer in model.named_modules() if layer in layers
        for child, module in layer.named_children() if any(True for _ in module.parameters())
    }  # fmt: skip
    idle = {b for b, m in blocks.items() if all(f"{b}.{n}" in unused for n, _ in m.named_parameters())}
    chosen: set[str] = set()
    for entry in config.where:
        places = PLACES.get(entry)
        found = {b for b in blocks if (b.rpartition(".")[2] in places if places else matches(b, entry))}
        holders = {b.rpartition(".")[0] for b in found}
        if not found or (places and len(holders) < len(layers)):
            rule = f"{len(layers) - len(holders)} of {len(layers)} decoder layers have no block of this name"
            raise InputError(f"method.where={entry}", rule, f"Name others of their blocks: {kinds(blocks)}")
        if found <= idle:
            rule = f"the blocks take no part in the loss of text alone: {min(found)}"
            raise InputError(f"method.where={entry}", rule, f"Name others: {kinds(b for b in blocks if b not in idle)}")
        chosen |= found - idle
    return [b for b in blocks if b in chosen]


def describe_bottlenecks(model: PreTrainedModel) -> list[str]:
    """For the log: how many there are, by the names of their blocks."""
    counts = Counter(n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, AdaptedBlock))
    return [f"bottlenecks on {', '.join(f'{count} x {name}' for name, count in counts.items())}"]


def bottleneck_tensors(model: PreTrainedModel, heads: list[str], read: Read) -> dict[str, Tensor]:
    """The parameters of the bottlenecks, and those of the new heads, under their names in the adapted model."""
    within = [n for n, m in model.named_modules() if isinstance(m, AdaptedBlock)]
    ours = tuple(f"{n}.adapter_{part}." for n in within for part in ("down", "up")) + tuple(f"{h}." for h in heads)
    return {n: read(p) for n, p in model.named_parameters() if n.startswith(ours)}
