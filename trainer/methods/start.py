"""Where training begins: a whole model, or an adapter on its base, from which it goes on.

`model.path` may be an adapter's folder, or a run's, which stands for its export. What is returned names the base and the adapter
apart, as a user may do: `model.path=<base> model.adapter=<folder>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from tritune.trainer.config import Config, MethodConfig, ModelConfig
from tritune.trainer.config.choices import AdapterMode
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_open import merged_into, method_of, read_settings, read_weights
from tritune.trainer.methods.states import as_it_is, copy_into
from tritune.trainer.model.files import ADAPTER_WEIGHTS, adapter_folder

RUN_FILES = ("config.yaml", "checkpoints")  # what tells a run's folder from a model's


def begun(config: Config, reading: bool = False) -> Config:
    """The configuration with base and adapter apart, and with the keys of the adapter's method.

    Args:
        reading: a run is read, whose own configuration is settled: its checkpoint holds all of an adapter that it went on with.

    Raises:
        InputError: as of `resolve_start` and `settle_method`.
    """
    if reading and config.model.adapter is not None and config.model.adapter_mode is AdapterMode.keep:
        return replace(config, model=replace(config.model, adapter=None))
    model = resolve_start(config.model)
    return replace(config, model=model, method=settle_method(config.method, model))


def base_to_read(model: ModelConfig) -> ModelConfig:
    """The base of a run that is read: with the adapter only where that is merged into it."""
    return resolve_start(model) if merges(model) or model.adapter is None else replace(model, adapter=None)


def resolve_start(model: ModelConfig) -> ModelConfig:
    """The base as `path`, and as `adapter` the folder of the adapter from which training goes on, if there is one.

    Raises:
        InputError: a run without an export; an adapter that does not name its base, or beside a whole model; none where one is
            named.
    """
    path = _export_of(model.path) if model.path else None
    if model.adapter is not None:
        found = adapter_folder(model.adapter)
        if found is None:
            remedy = "Give an adapter's folder, or leave it out"
            raise InputError(f"model.adapter={model.adapter}", "no adapter is there", remedy)
        read_settings(found)
        return replace(model, path=path, adapter=str(found))
    found = adapter_folder(path, model.revision) if path else None
    if found is None:
        return replace(model, path=path)
    if (found / "config.json").is_file():
        rule = "it holds a whole model and an adapter, and which of them is meant is not known"
        remedy = "Move the adapter to a folder of its own; model.adapter=<that folder> goes on with it"
        raise InputError(f"model.path={model.path}", rule, remedy)
    begun_with = on_its_base(model, found, read_settings(found))
    if not begun_with.path:
        remedy = f"Name both: model.adapter={model.path} model.path=<folder or hub id of its base>"
        raise InputError(f"model.path={model.path}", "the adapter does not say which model it belongs to", remedy)
    return replace(begun_with, adapter=str(found))


def on_its_base(model: ModelConfig, folder: Path, settings: dict[str, Any]) -> ModelConfig:
    """`model` with the base that the adapter in `folder` names as `path`, None where it names none, and with its tokenizer."""
    base = settings["base_model_name_or_path"]
    if base and not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    return replace(model, path=base, revision=settings["revision"], tokenizer=tokenizer_beside(model, folder))


def tokenizer_beside(model: ModelConfig, folder: Path) -> str | None:
    """The tokenizer that is given, else the adapter's own, where it has one."""
    own = model.tokenizer is None and (folder / "tokenizer_config.json").is_file()
    return str(folder) if own else model.tokenizer


def _export_of(path: str) -> str:
    """The export of a run, where `path` is a run's folder; else `path`."""
    folder = Path(path)
    if not all((folder / name).exists() for name in RUN_FILES):
        return path
    recorded = (read_lineage(folder / "summary.json").get("export") or {}).get("directory")
    export = folder / "export"  # first: the record may be of where the run lay before
    export = Path(recorded) if recorded and not export.is_dir() else export
    if not export.is_dir():
        raise InputError(
            f"model.path={path}", "it is a run that has no export", f"Make one: tritune export run.dir={path}"
        )
    return str(export)


def read_lineage(path: Path) -> dict[str, Any]:
    """What a run's summary says; nothing where there is none that reads."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lineage_of(model: ModelConfig) -> dict[str, Any] | None:
    """Where an adapter comes from, for the record, the card and the report: its folder, what it holds, and the run, the step and
    the data behind it, where it lies in its run's folder still.

    Args:
        model: as `resolve_start` gave it.
    """
    if model.adapter is None:
        return None
    folder = Path(model.adapter)
    found: dict[str, Any] = {
        "adapter": str(folder), "mode": model.adapter_mode.value,
        "sha256": sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest(),
    }  # fmt: skip
    run = folder.resolve().parent
    summary = read_lineage(run / "summary.json")
    if summary:
        content = read_lineage(run / "content.json")
        found |= {
            "run": str(run),
            "step": summary.get("tested_step") or summary.get("step"),
            "rows": content.get("rows"),
        }
    return found


def settle_method(method: MethodConfig, model: ModelConfig) -> MethodConfig:
    """The method with the keys of the adapter from which it goes on; those that compute nothing of it stay the user's.

    Raises:
        InputError: the adapter is another method's, or a key that the user gave is another there.
    """
    if model.adapter is None or merges(model):
        return method
    value = f"model.path={model.adapter}"
    theirs = method_of(Path(model.adapter), value)
    begin = ", or begin a new one on the merged model: model.adapter_mode=merge" if theirs.merges else ""
    if type(theirs) is not type(method):
        rule = f"its adapter is of method={theirs.name}, and method={method.name} would train"
        raise InputError(value, rule, f"Give method={theirs.name}{begin}")
    usual, changed = type(method)(), {}
    for field in fields(method):  # type: ignore[arg-type]
        mine, other = getattr(method, field.name), getattr(theirs, field.name)
        if field.name in method.of_the_run or mine == other:
            continue
        if mine != getattr(usual, field.name):
            rule = f"the adapter in {model.adapter} has {other}, and training goes on with it"
            raise InputError(f"method.{field.name}={mine}", rule, f"Leave it out{begin}")
        changed[field.name] = other
    return replace(method, **changed)


def merges(start: ModelConfig) -> bool:
    """Whether the adapter is merged into its base before training."""
    return start.adapter is not None and start.adapter_mode is AdapterMode.merge


def begins_whole(method: MethodConfig, start: ModelConfig) -> bool:
    """Whether a model that begins so must have its values before it is sharded."""
    return merges(start) or (start.adapter is not None and method.begins_with_weights)


def go_on(
    method: MethodConfig, model: PreTrainedModel, heads: list[str], start: ModelConfig, say: Callable[[str], None]
) -> None:
    """Give the layers that `method` attached the values of the adapter from which it goes on.

    Raises:
        InputError: its tensors are not those of these layers.
    """
    if start.adapter is not None and start.adapter_mode is AdapterMode.keep:
        say(f"start     goes on with the adapter in {start.adapter}")
        value = f"model.path={start.adapter}"
        tensors = read_weights(Path(start.adapter), value)
        if not method.take(model, heads, tensors, value):
            copy_into(method.adapter_tensors(model, heads, as_it_is), tensors, value)


def merge_start(
    model: PreTrainedModel, start: ModelConfig, num_tokens: int, say: Callable[[str], None]
) -> PreTrainedModel:
    """The base with the adapter merged into it, on which a new one begins; else the base.

    Raises:
        InputError: it cannot be merged.
    """
    if start.adapter is None or not merges(start):
        return model
    kind = method_of(Path(start.adapter), value := f"model.path={start.adapter}")
    if not kind.merges:
        rule = f"what method={kind.name} trained is no change of the base's weights and cannot be merged into them"
        raise InputError(f"model.adapter_mode=merge: {value}", rule, "Use model.adapter_mode=keep")
    say(f"start     the adapter in {start.adapter} is merged into its base, and another begins")
    return merged_into(Path(start.adapter), model, num_tokens, say)
