"""Write the result where other tools read it: PEFT's layout for an adapter, Hugging Face's for a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import Config, LoraConfig
from tritune.trainer.methods.adapter_io import save_adapter, whole


def export(
    directory: Path, config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: list[str]
) -> int:
    """Write model or adapter and tokenizer to `directory`, whole or not at all; return the weights' size in bytes."""
    partial = directory.with_name(f".partial-{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(config.method, LoraConfig):
        size = save_adapter(partial, config.method, model, heads, config.model.path)
    else:
        dtype = getattr(torch, config.model.dtype.value)
        model.config.use_cache = True  # training turned the cache off
        model.save_pretrained(partial, state_dict=_cast(model, dtype))
        model.config.use_cache = False
        _write_dtype(partial / "config.json", config.model.dtype.value)
        size = sum(p.stat().st_size for p in partial.glob("*.safetensors"))
    tokenizer.save_pretrained(partial)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
    return size


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in `dtype`. Tensors that were one stay one, or a tied matrix would be written twice."""
    done: dict[int, torch.Tensor] = {}
    return {n: done.setdefault(id(t), whole(t).to(dtype)) for n, t in model.state_dict(keep_vars=True).items()}


def _write_dtype(path: Path, dtype: str) -> None:
    """`save_pretrained` notes the dtype of the masters; whoever loads the model wants that of the file."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"dtype": dtype}, indent=2) + "\n")
