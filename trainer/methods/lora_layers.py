"""LoRA of our own (Hu et al. 2021, arXiv 2106.09685) on any set of linear layers."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.kernels.lora import lora_update_reference
from tritune.trainer.config.choices import Bias
from tritune.trainer.errors import InputError
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.patterns import matches
from tritune.trainer.methods.token_keys import TokenKeys, layer_id_of


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: base(x) + alpha / rank * drop(x) A^T B^T.

    Args:
        base_layer: Linear(K, N), kept as it is.
        rank, alpha, dropout: as in `LoraConfig`.
        layer_id: the layer's number for dropout.
        keys: says which tokens the input holds.
    """

    def __init__(self, base_layer: nn.Linear, config: LoraConfig, layer_id: int, keys: TokenKeys) -> None:
        super().__init__()
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.empty(config.rank, base_layer.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, config.rank, dtype=dtype))
        self.scaling, self.p, self.layer_id = config.alpha / config.rank, config.dropout, layer_id
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        # One node of the graph for both uses of x: their gradients are added before those of other layers, as ZeRO-3's
        # hooks around the layer make it. In bf16 another order of these sums is another rounding.
        x = x.view_as(x)
        dropped = self.keys.dropout(x, self.layer_id, self.p) if self.p and self.training else x
        return lora_update_reference(self.base_layer(x), dropped, self.lora_A, self.lora_B, self.scaling)

    def reset(self, seed: int) -> None:
        """A uniform as in Linear, B zero: the update starts at 0. A's values depend on (seed, layer_id) alone."""
        generator = torch.Generator().manual_seed((seed * 0x9E3779B9 + self.layer_id) % 2**63)
        bound = 1.0 / math.sqrt(self.lora_A.shape[1])  # kaiming_uniform_ with a = sqrt(5), as PEFT and the paper's code
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()


def add_lora(
    config: LoraConfig, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str] = ()
) -> TokenKeys | None:
    """Freeze `model`, wrap the target layers and release what else trains (biases, `modules_to_save`, new heads).

    Args:
        unused: parameters that take no part in the loss: a layer of such a weight gets no update.

    Raises:
        InputError: a target or a module to save that matches nothing, or nothing that takes part in the loss.
    """
    output = model.get_output_embeddings()
    linears = _linears(model, heads)
    names = target_names(config, linears, {n for n, m in linears.items() if m is output}, unused)
    model.requires_grad_(False)
    keys = TokenKeys()
    for name in names:
        layer = LoRALinear(linears[name], config, layer_id_of(name), keys)
        layer.reset(seed)
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
        if any(isinstance(m, LoRALinear) for m in module.modules()):
            remedy = "Take it out of method.targets or of method.modules_to_save"
            raise InputError(f"method.modules_to_save={name}", "it holds a layer that LoRA adapts", remedy)
        module.requires_grad_(True)
    return keys if config.dropout else None


def _linears(model: nn.Module, heads: list[str]) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in heads}


def target_names(
    config: LoraConfig, linears: dict[str, nn.Linear], output: set[str], unused: Collection[str] = ()
) -> list[str]:
    """Names of the linear layers to adapt, in the model's order.

    `all-linear` means every one but the output head; other entries are a name's end (`q_proj`, `mlp.up_proj`) or a glob.
    Layers whose weight is `unused` are none of them.
    """
    idle = {n for n in linears if f"{n}.weight" in unused}
    chosen: set[str] = set()
    for pattern in config.targets:
        found = {n for n in linears if (pattern == "all-linear" and n not in output) or matches(n, pattern)}
        if not found:
            kinds = sorted({n.rpartition(".")[2] for n in linears})
            remedy = f"The model has {', '.join(kinds)}" if kinds else "It has none at all: use method=full"
            raise InputError(f"method.targets={pattern}", "no linear layer has this name", remedy)
        if found <= idle:
            rule = f"it names layers that take no part in the loss of text alone: {len(found)}, as {min(found)}"
            kinds = sorted({n.rpartition(".")[2] for n in linears if n not in idle | output})
            raise InputError(f"method.targets={pattern}", rule, f"Take it out; these take part: {', '.join(kinds)}")
        chosen |= found - idle
    chosen = {n for n in chosen if not any(matches(n, e) for e in config.exclude)}
    if not chosen:
        raise InputError(f"method.exclude={config.exclude}", "no layer is left to adapt", "Exclude less")
    return [n for n in linears if n in chosen]


def unused_targets(config: LoraConfig, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
    """Layers that the targets name and that get no update, since they take no part in the loss; before `add_lora`."""
    idle = [n for n in _linears(model, []) if f"{n}.weight" in unused]
    named = [n for n in idle if any(t == "all-linear" or matches(n, t) for t in config.targets)]
    return [n for n in named if not any(matches(n, e) for e in config.exclude)]


def saved_modules(
    config: LoraConfig, model: PreTrainedModel, heads: list[str], unused: Collection[str] = ()
) -> list[str]:
    """Full names of the modules that train whole: `modules_to_save` and the new heads; none that is `unused` altogether."""
    names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    result = list(heads)
    for pattern in config.modules_to_save:
        found = [n for n in names if matches(n, pattern)]
        if not found:
            remedy = f"It has {', '.join(n for n in names if '.' not in n)} and what lies in them"
            raise InputError(f"method.modules_to_save={pattern}", "the model has no module of this name", remedy)
        found, idle = [n for n in found if not _is_idle(model, n, unused)], found
        if not found:
            rule = f"it takes no part in the loss of text alone: {idle[0]}"
            raise InputError(
                f"method.modules_to_save={pattern}", rule, "Take it out: it stays as the base model has it"
            )
        result += [n for n in found if n not in result]
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and getattr(output, "weight", None) is embeddings.weight:
        both = [n for n, m in model.named_modules() if m is embeddings or m is output]
        if set(both) & set(result):  # one tensor under two names: whoever loads only one of them unties it
            result += [n for n in both if n not in result]
    return result


def _is_idle(model: nn.Module, name: str, unused: Collection[str]) -> bool:
    parameters = model.get_submodule(name).named_parameters(remove_duplicate=False)
    return all(f"{name}.{key}" in unused for key, _ in parameters)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by the name of the layer each stands for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
