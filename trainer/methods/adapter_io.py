"""Write adapters: in PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`, or in one of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel
from tritune.trainer.config import MethodConfig
from tritune.trainer.methods.own_adapter import own_settings
from tritune.trainer.methods.states import Read, whole
from tritune.trainer.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OWN_ADAPTER_CONFIG

LABELS = "labels.json"  # beside an adapter for a classifier: PEFT's layout has no place for names


def save_adapter(
    directory: Path,
    method: MethodConfig,
    model: PreTrainedModel,
    heads: list[str],
    base: str | None,
    revision: str | None = None,
    read: Read = whole,
) -> int:
    """Write the adapter; return the size of its weights in bytes.

    Args:
        heads: modules that are new and belong to the adapter (a classification head).
        base, revision: hub id or folder of the base model, so that PEFT finds it.
        read: the values of a tensor of `model`.
    """
    tensors = method.adapter_tensors(model, heads, read)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ADAPTER_WEIGHTS
    save_file({n: t.cpu().clone().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    save_settings(directory, method, model, heads, base, revision)
    return path.stat().st_size


def save_settings(
    directory: Path,
    method: MethodConfig,
    model: PreTrainedModel,
    heads: list[str],
    base: str | None,
    revision: str | None,
) -> None:
    """Write `adapter_config.json`, or `tritune_adapter.json`. Arguments as of `save_adapter`."""
    settings: dict[str, Any] = {
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
    }
    if method.in_peft:
        name, settings = ADAPTER_CONFIG, {**settings, "inference_mode": True, **method.adapter_settings(model, heads)}
    else:
        name, settings = OWN_ADAPTER_CONFIG, {**own_settings(method, model, heads), **settings}
    (directory / name).write_text(json.dumps(settings, indent=2) + "\n")
