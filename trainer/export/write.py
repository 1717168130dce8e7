"""The files: PEFT's layout for an adapter, Hugging Face's for a whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.schema import ExportConfig
from tritune.trainer.export.carried import in_config, write_beside
from tritune.trainer.export.stream import plan, write_tensors
from tritune.trainer.methods.adapter_io import save_adapter

if TYPE_CHECKING:
    from tritune.trainer.export.source import Source

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def new_folder(directory: Path) -> Path:
    """An empty folder beside `directory`, which takes its place once all of it is written and read back."""
    partial = directory.with_name(f".partial-{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_adapter(directory: Path, source: Source, say: Callable[[str], None]) -> int:
    """Write the adapter; return the size of its weights in bytes."""
    config = source.config
    base = config.model.path
    if base is not None and Path(base).is_dir():
        base = str(Path(base).resolve())  # a relative path would depend on where the reader stands
    size = save_adapter(directory, config.method, source.model, source.heads, base, config.model.revision, source.read)
    write_beside(directory, source)
    if not config.method.in_peft:
        say(f"export    PEFT has no method={config.method.name}: the adapter is in a layout of our own, which evaluate and "
            "generate read (model.path=<its folder>)")  # fmt: skip
    if not source.heads:
        source.model.generation_config.save_pretrained(directory)
    return size


def write_whole(directory: Path, source: Source, say: Callable[[str], None]) -> int:
    """Write the whole model, updates merged in where there are any; return the size of its weights in bytes."""
    config, model = source.config, source.model
    dtype = export_dtype(config.export, config.model)
    shard_bytes = int(config.export.shard_gb * 1e9)
    tensors = config.method.whole_tensors(model, dtype, source.read, say)
    model.config.use_cache = True  # training turned the cache off
    planned = plan(model, config.method.whole_shapes(model), dtype, shard_bytes)
    if planned is not None:
        _write_settings(directory, model)
        size = write_tensors(directory, planned, tensors)
    else:
        say(
            f"export    {model.config.model_type}'s files hold other tensors than the model: all are made in memory first"
        )
        model.save_pretrained(directory, state_dict=_state_of(model, tensors), max_shard_size=shard_bytes)
        size = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    model.config.use_cache = False
    # transformers notes the dtype of the masters; whoever loads the model wants that of the file.
    path = directory / "config.json"
    name = str(dtype).removeprefix("torch.")
    settings = in_config(json.loads(path.read_text()), source) | {"dtype": name}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    _copy_processors(directory, source, say)
    return size


def _write_settings(directory: Path, model: PreTrainedModel) -> None:
    """What `save_pretrained` writes beside weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)  # type: ignore[union-attr,operator]


def _state_of(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors. Those that are one stay one, or a tied matrix would be written twice."""
    own, done = model.state_dict(keep_vars=True), dict[int, Tensor]()
    return {name: done.setdefault(id(own.get(name, name)), tensor) for name, tensor in tensors}


def _copy_processors(directory: Path, source: Source, say: Callable[[str], None]) -> None:
    """Copy how the base prepares images, which its whole model still sees, though text alone was trained."""
    config, model = source.config.model, source.model.config
    if config.path is None or model.get_text_config() is model:
        return
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    for name in PROCESSORS:
        found = cached_file(config.path, name, revision=config.revision, **lenient)
        if found is not None:
            shutil.copyfile(found, directory / name)
    if not any((directory / name).is_file() for name in PROCESSORS):
        say(f"export    {config.path} has no {PROCESSORS[0]}, and so the export has none: it will be read for text")


def export_dtype(export: ExportConfig, model: ModelConfig) -> torch.dtype:
    return getattr(torch, (export.dtype or model.dtype).value)
