"""Write and read LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from tritune.trainer.config import LoraConfig
from tritune.trainer.config_choices import Bias
from tritune.trainer.errors import InputError
from tritune.trainer.methods.lora import add_lora, lora_layers, saved_modules

PREFIX = "base_model.model."
LABELS = "labels.json"  # beside an adapter for a classifier: PEFT's layout has no place for names
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT's LoRA can do beyond ours. An adapter that uses it would compute something else here.
_FOREIGN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out",
            "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
            "use_qalora", "use_bdlora", "arrow_config", "monteclora_config", "kasa_config", "velora_config")  # fmt: skip


def save_adapter(
    directory: Path,
    config: LoraConfig,
    model: PreTrainedModel,
    heads: list[str],
    base: str | None,
    revision: str | None = None,
) -> int:
    """Write the adapter; return the size of its weights in bytes.

    Args:
        heads: modules that are new and belong to the adapter (a classification head).
        base, revision: hub id or folder of the base model, so that PEFT finds it.
    """
    tensors = adapter_tensors(config, model, heads)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ADAPTER_WEIGHTS
    save_file({n: whole(t).cpu().clone().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    save_settings(directory, config, model, heads, base, revision)
    return path.stat().st_size


def adapter_tensors(config: LoraConfig, model: PreTrainedModel, heads: list[str]) -> dict[str, Tensor]:
    """What an adapter's file holds, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in _saved_whole(config, model, heads):
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    for name, parameter in model.named_parameters():
        # As with PEFT, `all` writes those too that did not train because they take no part in the loss.
        written = config.bias is Bias.all or (config.bias is Bias.lora_only and parameter.requires_grad)
        if written and name.endswith("bias"):
            tensors[PREFIX + name] = parameter
    return tensors


def _saved_whole(config: LoraConfig, model: PreTrainedModel, heads: list[str]) -> list[str]:
    """The modules to save that trained: of those that `modules_to_save` matches, some may take no part in the loss."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return saved_modules(config, model, heads, frozen)


def save_settings(
    directory: Path,
    config: LoraConfig,
    model: PreTrainedModel,
    heads: list[str],
    base: str | None,
    revision: str | None,
) -> None:
    """Write `adapter_config.json`. Arguments as of `save_adapter`."""
    saved = _saved_whole(config, model, heads)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": config.bias.value,
        "target_modules": _short_targets(model, list(lora_layers(model))),
        "modules_to_save": saved or None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the adapter's settings.

    Raises:
        InputError: it is no LoRA adapter, or uses what our LoRA does not do.
    """
    settings = json.loads((directory / ADAPTER_CONFIG).read_text())
    foreign = [name for name in _FOREIGN if settings.get(name)]
    if settings.get("init_lora_weights") not in (True, False, None, "gaussian"):  # pissa and its like change the base
        foreign.append(f"init_lora_weights={settings['init_lora_weights']}")
    if settings.get("peft_type") != "LORA" or foreign:
        rule = f"it is a {settings.get('peft_type')} adapter" + (f" with {', '.join(foreign)}" if foreign else "")
        raise InputError(f"model.path={directory}", rule, "Plain LoRA adapters are read here; merge it with PEFT first")
    return {"task_type": None, "base_model_name_or_path": None, **settings}


def add_saved_adapter(directory: Path, settings: dict[str, Any], model: PreTrainedModel, heads: list[str]) -> None:
    """Put the adapter's layers and weights into `model`, in place.

    Raises:
        InputError: a tensor of the file has no place in the model, or a place none in the file.
    """
    targets = settings["target_modules"]
    # PEFT lists every name that a classifier's head can have.
    absent = {"classifier", "score"} - set(dict(model.named_modules())) if heads else set()
    config = LoraConfig(
        rank=settings["r"], alpha=settings["lora_alpha"], bias=Bias(settings.get("bias", "none")),
        targets=[targets] if isinstance(targets, str) else targets,
        exclude=settings.get("exclude_modules") or [],
        modules_to_save=[m for m in settings.get("modules_to_save") or [] if m not in heads and m not in absent],
    )  # fmt: skip
    add_lora(config, model, heads, seed=0)
    places = dict(model.named_parameters(remove_duplicate=False))
    weights = load_file(directory / ADAPTER_WEIGHTS)
    names = {written: _name_here(written) for written in weights}
    for written, name in names.items():
        place, tensor = places.get(name), weights[written]
        if place is None or place.shape != tensor.shape:
            found = "no such parameter" if place is None else f"shape {list(place.shape)} there"
            rule = f"its {written} {list(tensor.shape)} does not fit the model: {found}"
            raise InputError(f"model.path={directory}", rule, "Check that base_model_name_or_path is its base")
        with torch.no_grad():
            place.copy_(tensor)
    filled = {id(places[name]) for name in names.values()}  # a tied matrix has two names
    left = sorted(n for n, p in places.items() if p.requires_grad and id(p) not in filled)
    if left:
        rule = f"{len(left)} of its parameters are missing from the file: {', '.join(left[:3])}"
        raise InputError(f"model.path={directory}", rule, "Give a whole adapter")


def _name_here(written: str) -> str:
    """PEFT keeps `lora_A` in a linear layer of its own; ours is a parameter."""
    name = written.removeprefix(PREFIX)
    return name.removesuffix(".weight") if ".lora_" in name else name


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _short_targets(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The layers' last names where they pick exactly these layers, else the full names; PEFT matches ends of names."""
    last = sorted({n.rpartition(".")[2] for n in names})
    picked = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in last}
    return last if picked == set(names) else sorted(names)
