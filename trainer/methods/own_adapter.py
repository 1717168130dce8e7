"""Adapters of methods that PEFT does not have, in a layout of our own: `tritune_adapter.json` names the method and its keys,
`adapter_model.safetensors` holds parameters under their names in the adapted model. The method itself puts its layers in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.trainer.config.axes import MethodConfig
from tritune.trainer.config.registry import axis_options
from tritune.trainer.errors import InputError, reason
from tritune.trainer.methods.states import as_it_is
from tritune.trainer.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OWN_ADAPTER_CONFIG
from tritune.trainer.model.folder import read_settings_file
from tritune.trainer.shown import bounded

LAYOUT = 1  # raised when older readers would take a file for something else
_KEYS = {"layout", "method", "keys", "heads", "task_type", "base_model_name_or_path", "revision"}
_REMEDY = "Export it again from its run"


def own_settings(method: MethodConfig, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
    """What `tritune_adapter.json` says beside the adapter's task and base."""
    return {"layout": LAYOUT, "method": method.name, "keys": method.adapter_settings(model, heads), "heads": heads}


def read_own_settings(directory: Path) -> dict[str, Any]:
    """The settings, `task_type`, `base_model_name_or_path` and `revision` among them, perhaps None.

    Raises:
        InputError: they do not read, or are those of another layout or of a method that is not here.
    """
    value = f"model.path={directory}"
    settings = {"task_type": None, "base_model_name_or_path": None, "revision": None}
    settings |= read_settings_file(directory / OWN_ADAPTER_CONFIG, value)
    if (directory / ADAPTER_CONFIG).exists():
        rule = f"it holds two adapters, {OWN_ADAPTER_CONFIG} and {ADAPTER_CONFIG}"
        raise InputError(value, rule, "Leave one of them there")
    if settings.get("layout") != LAYOUT or (more := sorted(set(settings) - _KEYS)):
        other = settings.get("layout") if settings.get("layout") != LAYOUT else ", ".join(more)
        rule = f"its {OWN_ADAPTER_CONFIG} says {bounded(str(other), 60)}, and layout {LAYOUT} is read here"
        raise InputError(value, rule, "Read it with the version of Tritune that wrote it, or export it again")
    for name in ("task_type", "base_model_name_or_path", "revision"):
        if not isinstance(settings[name], str | None):
            raise InputError(
                value, f"its {OWN_ADAPTER_CONFIG} has {name}={settings[name]!r}, which is no text", _REMEDY
            )
    heads: Any = settings.get("heads")
    if not isinstance(heads, list) or not all(isinstance(h, str) for h in heads):
        raise InputError(value, f"its {OWN_ADAPTER_CONFIG} has no list of heads", _REMEDY)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(value, f"it has no {ADAPTER_WEIGHTS}, and other formats can run code", _REMEDY)
    own_method(settings, value)
    return settings


def own_method(settings: dict[str, Any], value: str) -> MethodConfig:
    """The option with the keys that the file gives."""
    name = settings.get("method")
    kind = axis_options("method").get(name) if isinstance(name, str) else None
    if kind is None or kind.in_peft or not kind.writes_adapter:
        rule = f"it is an adapter of method={bounded(str(name), 60)}, which is not known here"
        raise InputError(value, rule, "Where the method is a file of yours, name it: plugins=[FILE]")
    try:
        method: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), settings.get("keys")))
    except Exception as error:  # noqa: BLE001  whatever a key of another type makes the library raise
        raise InputError(value, f"its keys cannot be read ({reason(error)})", _REMEDY) from None
    faults: list[str] = []
    method.check(lambda holds, key, said: None if holds else faults.append(f"{key}: {said}"))
    if faults:
        raise InputError(value, f"its {OWN_ADAPTER_CONFIG} says what no adapter is, {faults[0]}", _REMEDY)
    return method  # type: ignore[no-any-return]


def add_own_adapter(directory: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` with the adapter's layers in it; it is changed.

    Args:
        directory: as `read_own_settings` accepts it.
        model: the base, whose head is replaced where the adapter has one.

    Raises:
        InputError: the adapter does not fit its base, or a tensor of its file would be left out, or is not there.
    """
    value, settings = f"model.path={directory}", read_own_settings(directory)
    method, heads = own_method(settings, value), settings["heads"]
    weights = _read(directory / ADAPTER_WEIGHTS, value)
    modules = {name for name, _ in model.named_modules()}
    try:
        absent = next((h for h in heads if h not in modules), None)
        if absent is not None:
            raise InputError(f"heads={absent}", "the base has no such module", "")
        with torch.device("meta"):  # a file that says a size of a billion takes no memory, and nothing is drawn
            method.attach(model, heads, 0, ())
        expected = method.adapter_tensors(model, heads, as_it_is)
    except InputError as error:
        raise InputError(value, f"it does not fit its base: {error.value}: {error.rule}", "Check its base") from None
    except (RuntimeError, OverflowError, TypeError) as error:  # a size that no tensor has
        raise InputError(value, f"it does not fit its base ({reason(error)})", _REMEDY) from None
    differ = sorted(n for n in {*weights, *expected} if n not in weights or _shape(weights, n) != _shape(expected, n))
    if differ:
        name = differ[0]
        rule = f"{len(differ)} tensor(s) of its file do not fit its base: {bounded(name, 200)} is "
        rule += f"{_shape(weights, name) or 'not'} there, and {_shape(expected, name) or 'not'} expected"
        raise InputError(value, rule, "Check that base_model_name_or_path is its base, and that the file is whole")
    dtype = next(p.dtype for p in model.parameters() if p.device.type != "meta")
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return model


def _read(path: Path, value: str) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except Exception as error:  # noqa: BLE001  whatever a broken file makes the library raise
        raise InputError(value, f"its {path.name} does not read ({reason(error)})", _REMEDY) from None
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            rule = f"its {bounded(name, 200)} holds NaN or Inf, or no numbers of ours"
            raise InputError(value, rule, "Take a checkpoint from before they were lost")
    return weights


def _shape(tensors: dict[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
