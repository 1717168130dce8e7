"""Write adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel
from tritune.trainer.config import MethodConfig
from tritune.trainer.methods.states import Read, whole
from tritune.trainer.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

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
    tensors = method.adapter_tensors(model, heads)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ADAPTER_WEIGHTS
    save_file({n: read(t).cpu().clone().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
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
    """Write `adapter_config.json`. Arguments as of `save_adapter`."""
    settings = {
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **method.adapter_settings(model, heads),
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
