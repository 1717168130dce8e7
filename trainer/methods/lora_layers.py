"""LoRA of our own (Hu et al. 2021, arXiv 2106.09685) on any set of linear layers."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tritune.kernels.lora import lora_update_reference
from tritune.trainer.config.choices import Bias
from tritune.trainer.errors import InputError
from tritune.trainer.methods.dora import DoraLinear
from tritune.trainer.methods.linear import features
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.states import Read
from tritune.trainer.methods.targets import linear_layers, saved_modules, target_names
from tritune.trainer.methods.token_keys import TokenKeys, layer_id_of


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: base(x) + scaling * drop(x) A^T B^T.

    Args:
        base_layer: of K inputs and N outputs, kept as it is.
        config: gives rank, scaling and dropout by the layer's name.
        name: the layer's in the model; its number for dropout is made of it.
        keys: says which tokens the input holds.
    """

    own = ("lora_A", "lora_B")  # what it adds to the layer
    direct = False  # whether the base computes without hooks, since its weight is gathered by who calls (`TokenScorer`)
    update_only = True  # its output is the base's plus the update: what the kernels of LoRA compute

    def __init__(self, base_layer: nn.Linear | Conv1D, config: LoraConfig, name: str, keys: TokenKeys) -> None:
        super().__init__()
        dtype, (inputs, outputs) = torch.promote_types(base_layer.weight.dtype, torch.float32), features(base_layer)
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.empty(config.rank_of(name), inputs, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank_of(name), dtype=dtype))
        self.scaling, self.p, self.layer_id = config.scaling_of(name), config.dropout, layer_id_of(name)
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        # One node of the graph for both uses of x: their gradients are added before those of other layers, as ZeRO-3's
        # hooks around the layer make it. In bf16 another order of these sums is another rounding.
        x = x.view_as(x)
        dropped = self.keys.dropout(x, self.layer_id, self.p) if self.p and self.training else x
        y = self.base_layer.forward(x) if self.direct else self.base_layer(x)
        return lora_update_reference(y, dropped, self.lora_A, self.lora_B, self.scaling)

    def merged(self, weight: Tensor, read: Read) -> Tensor:
        """The weight that alone computes what this layer does: [N, K] from [N, K], in its dtype."""
        return weight + self.scaling * (read(self.lora_B).to(weight.dtype) @ read(self.lora_A).to(weight.dtype))

    def saved(self, read: Read) -> dict[str, Tensor]:
        """What an adapter's file holds of this layer, by PEFT's names."""
        return {"lora_A.weight": read(self.lora_A), "lora_B.weight": read(self.lora_B)}


Adapted = LoRALinear | DoraLinear


def reset(layer: Adapted, seed: int) -> None:
    """A uniform as in Linear, B zero: the update starts at 0. A's values depend on (seed, layer_id) alone."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B9 + layer.layer_id) % 2**63)
    bound = 1.0 / math.sqrt(layer.lora_A.shape[1])  # kaiming_uniform_ with a = sqrt(5), as PEFT and the paper's code
    with torch.no_grad():
        layer.lora_A.uniform_(-bound, bound, generator=generator)
        layer.lora_B.zero_()


def add_lora(
    config: LoraConfig, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str] = ()
) -> TokenKeys | None:
    """Freeze `model`, wrap the target layers and release what else trains (biases, `modules_to_save`, new heads).

    Args:
        unused: parameters that take no part in the loss: a layer of such a weight gets no update.

    Raises:
        InputError: a target, a pattern or a module to save that matches nothing, or nothing that takes part in the loss; a
            layer that cannot be adapted so.
    """
    linears, names = linear_layers(model, heads), target_names(config, model, heads, unused)
    _require_used(config, names)
    model.requires_grad_(False)
    keys = TokenKeys()
    kind = DoraLinear if config.dora else LoRALinear
    for name in names:
        layer: Adapted = kind(linears[name], config, name, keys)  # type: ignore[arg-type]  # of the kinds in `LINEAR`
        reset(layer, seed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        if config.bias is Bias.lora_only and layer.base_layer.bias is not None:
            layer.base_layer.bias.requires_grad_(True)
    if config.bias is Bias.all:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.requires_grad_(True)
    for name in saved_modules(config, model, heads, unused):
        module = model.get_submodule(name)
        if any(isinstance(m, Adapted) for m in module.modules()):
            remedy = "Take it out of method.targets or of method.modules_to_save"
            raise InputError(f"method.modules_to_save={name}", "it holds a layer that LoRA adapts", remedy)
        module.requires_grad_(True)
    return keys if config.dropout else None


def _require_used(config: LoraConfig, names: list[str]) -> None:
    """Refuse a pattern of ranks or alphas that decides nothing."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key)
        used = {config.pattern_of(patterns, name) for name in names}
        for pattern in patterns:
            if pattern not in used:
                rule = "no adapted layer takes its value: it is the end of no name, or an earlier pattern comes first"
                raise InputError(f"method.{key}.{pattern}", rule, f"Take it out; a name is, for example, {names[0]}")


def lora_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by the name of the layer each stands for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}
