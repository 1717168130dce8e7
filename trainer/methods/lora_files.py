"""What a LoRA adapter holds in PEFT's layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tritune.trainer.config.choices import Bias
from tritune.trainer.methods.adapter_open import PREFIX
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.methods.states import Read
from tritune.trainer.methods.targets import saved_modules


def adapter_tensors(config: LoraConfig, model: PreTrainedModel, heads: list[str], read: Read) -> dict[str, Tensor]:
    """What an adapter's file holds, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in layer.saved(read).items()}
    for name in _saved_whole(config, model, heads):
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[f"{PREFIX}{name}.{key}"] = read(value)
    for name, parameter in model.named_parameters():
        # As with PEFT, `all` writes those too that did not train because they take no part in the loss.
        written = config.bias is Bias.all or (config.bias is Bias.lora_only and parameter.requires_grad)
        if written and name.endswith(".bias"):
            tensors[PREFIX + name] = read(parameter)
    return tensors


def _saved_whole(config: LoraConfig, model: PreTrainedModel, heads: list[str]) -> list[str]:
    """The modules to save that trained: of those that `modules_to_save` matches, some may take no part in the loss."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return saved_modules(config, model, heads, frozen)


def adapter_settings(config: LoraConfig, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
    """What `adapter_config.json` says of LoRA."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "lora_dropout": config.dropout,
        "bias": config.bias.value,
        "target_modules": _short_targets(model, list(lora_layers(model))),
        "modules_to_save": _saved_whole(config, model, heads) or None,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in lora_layers(model).values()),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }


def _short_targets(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The layers' last names where they pick exactly these layers, else the full names; PEFT matches ends of names."""
    last = sorted({n.rpartition(".")[2] for n in names})
    picked = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in last}
    return last if picked == set(names) else sorted(names)
