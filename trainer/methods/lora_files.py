"""What a LoRA adapter holds in PEFT's layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tritune.trainer.config.choices import Bias
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_open import PREFIX
from tritune.trainer.methods.lora import REGEX, LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.methods.states import Read, as_it_is, copy_into
from tritune.trainer.methods.targets import saved_modules

MAGNITUDE = "lora_magnitude_vector"
# Settings of adapters that PEFT opens, and that no key of ours trains.
_WITHOUT_KEY = ("lora_bias", "layers_to_transform", "layers_pattern", "trainable_token_indices")
_HEADS = ("score", "classifier")  # PEFT names a classifier's head among the modules to save


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


@torch.no_grad()
def take(config: LoraConfig, model: PreTrainedModel, heads: list[str], tensors: dict[str, Tensor], value: str) -> None:
    """Give the layers the values of an adapter's file; DoRA's lengths are kept as what they are beside the base's.

    Raises:
        InputError: names or shapes differ.
    """
    places = adapter_tensors(config, model, heads, as_it_is)
    begun = {n: tensor.clone() for n, tensor in places.items() if n.endswith(MAGNITUDE)}
    copy_into(places, tensors, value)
    layers: dict[str, Any] = dict(lora_layers(model))
    for name, layer in layers.items():
        if (key := f"{PREFIX}{name}.{MAGNITUDE}") in begun:
            layer.magnitude_change.copy_(tensors[key] - begun[key])


def of_settings(settings: dict[str, Any], value: str) -> LoraConfig:
    """The keys that made an adapter with such settings.

    Raises:
        InputError: a setting has no key here, and training would lose it.
    """
    foreign = [name for name in _WITHOUT_KEY if settings.get(name)]
    if foreign:
        rule = f"it is a LoRA adapter with {', '.join(foreign)}, and training does not go on with these"
        raise InputError(value, rule, "Merge it: model.adapter_mode=merge")
    targets, exclude = (_patterns(settings.get(name)) for name in ("target_modules", "exclude_modules"))
    ranks, alphas = (dict(settings.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    return LoraConfig(
        rank=settings.get("r", 8), alpha=float(settings.get("lora_alpha", 8)), dropout=float(settings.get("lora_dropout") or 0),
        targets=targets, exclude=exclude, bias=Bias(settings.get("bias", "none")),
        modules_to_save=[n for n in settings.get("modules_to_save") or [] if n not in _HEADS],
        rslora=bool(settings.get("use_rslora")), dora=bool(settings.get("use_dora")), rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip


def _patterns(found: Any) -> list[str]:
    """PEFT's names or its expression, as keys of ours; of `layer` with another's number in it PEFT takes ends of names, too."""
    if not found:
        return []
    return [found if found == "all-linear" else f"{REGEX}{found}"] if isinstance(found, str) else sorted(found)


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
