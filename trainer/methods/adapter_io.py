"""Write LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from tritune.trainer.config.choices import Bias
from tritune.trainer.methods.adapter_open import PREFIX
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers, saved_modules
from tritune.trainer.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

LABELS = "labels.json"  # beside an adapter for a classifier: PEFT's layout has no place for names


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
        if written and name.endswith(".bias"):
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


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _short_targets(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The layers' last names where they pick exactly these layers, else the full names; PEFT matches ends of names."""
    last = sorted({n.rpartition(".")[2] for n in names})
    picked = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in last}
    return last if picked == set(names) else sorted(names)
