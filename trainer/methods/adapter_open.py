"""Open an adapter in PEFT's layout to read it: PEFT itself puts LoRA's layers on their base, so that they compute what they do
there; an adapter of another type, or of our own layout, is put on by the method that trains such ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from tritune.trainer.config.axes import MethodConfig
from tritune.trainer.config.registry import built_in
from tritune.trainer.errors import InputError, reason
from tritune.trainer.methods.linear import LINEAR
from tritune.trainer.methods.merge import Rounding
from tritune.trainer.methods.own_adapter import add_own_adapter, own_method, read_own_settings
from tritune.trainer.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OWN_ADAPTER_CONFIG
from tritune.trainer.model.folder import read_settings_file, require_sound
from tritune.trainer.model.load import cast_parameters
from tritune.trainer.shown import bounded

PREFIX = "base_model.model."
_FITS = "Check that base_model_name_or_path is its base, and that the file is whole"
_MOST_RANK, _MOST_ALPHA = 1_000_000, 1_000_000_000  # far above any adapter; an alpha beyond float32 is infinite there
# Settings that say nothing of what an adapter computes once its weights are there.
_SILENT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
           "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "init_lora_weights"}  # fmt: skip
# Those with which a test compares what is opened here with PEFT's own. Whatever else is set might need more than layers
# (prompts, a router, other inputs), and is refused by its name: those of PEFT's later versions, too.
_COMPARED = {"r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "lora_bias", "use_rslora",
             "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
             "trainable_token_indices", "ensure_weight_tying"}  # fmt: skip


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the adapter's settings; `task_type`, `base_model_name_or_path` and `revision` are there, perhaps None.

    Raises:
        InputError: the file does not read, or the adapter is none that is opened here.
    """
    value, remedy = f"model.path={directory}", "Save it again with PEFT"
    require_sound(directory, value)
    if (directory / OWN_ADAPTER_CONFIG).is_file():
        return read_own_settings(directory)
    settings = read_settings_file(directory / ADAPTER_CONFIG, value)
    settings = {"task_type": None, "base_model_name_or_path": None, "revision": None, **settings}
    for name in ("task_type", "base_model_name_or_path", "revision"):
        if not isinstance(settings[name], str | None):
            raise InputError(value, f"its {ADAPTER_CONFIG} has {name}={settings[name]!r}, which is no text", remedy)
    if (own := _opened_by(settings)) is not None:
        own.of_adapter(settings, value)
        return _with_weights(settings, directory, value, remedy)
    foreign = sorted(n for n, v in settings.items() if v and n not in _SILENT | _COMPARED)
    start = settings.get("init_lora_weights")
    if start not in (True, False, None, "gaussian"):  # pissa and its like change the base
        foreign.append(f"init_lora_weights={start}")
    if settings.get("peft_type") != "LORA" or foreign:
        rule = f"it is a {settings.get('peft_type')} adapter" + (f" with {', '.join(foreign)}" if foreign else "")
        raise InputError(value, rule, "LoRA without these is read here. Merge it with PEFT, and give the merged model")
    _require_numbers(settings, value)
    return _with_weights(settings, directory, value, remedy)


def _opened_by(settings: dict[str, Any]) -> MethodConfig | None:
    """The method that opens an adapter of this type itself."""
    found = _of_type(settings)
    return None if found is None or found.peft_opens else found


def _of_type(settings: dict[str, Any]) -> MethodConfig | None:
    """The method of an adapter's type."""
    kinds = [kind() for kind in built_in("method").values()]
    return next((kind for kind in kinds if kind.peft_type and kind.peft_type == settings.get("peft_type")), None)


def method_of(directory: Path, value: str) -> MethodConfig:
    """The method, with its keys, that trained the adapter.

    Args:
        directory: as `read_settings` accepts it.

    Raises:
        InputError: it is of no method of ours, or was made by settings that none of its keys stands for.
    """
    settings = read_settings(directory)
    if (directory / OWN_ADAPTER_CONFIG).is_file():
        return own_method(settings, value)
    found = _of_type(settings)
    assert found is not None, "read_settings refuses other types"
    return found.of_adapter(settings, value)


def _with_weights(settings: dict[str, Any], directory: Path, value: str, remedy: str) -> dict[str, Any]:
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(value, f"it has no {ADAPTER_WEIGHTS}, and other formats can run code", remedy)
    return settings


def _require_numbers(settings: dict[str, Any], value: str) -> None:
    """Refuse ranks, alphas and shares that no layer computes with: PEFT multiplies by alpha / r as they are."""
    ranks = {"r": settings.get("r", 8), **_patterns(settings, "rank_pattern")}
    alphas = {"lora_alpha": settings.get("lora_alpha", 8), **_patterns(settings, "alpha_pattern")}
    for name, rank in ranks.items():
        if type(rank) is not int or not 0 < rank <= _MOST_RANK:
            raise _no_number(value, name, rank, f"a rank is a whole number from 1 to {_MOST_RANK:,}")
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:
            raise _no_number(value, name, alpha, f"an alpha is a number above 0, up to {_MOST_ALPHA:,}")
    dropout = settings.get("lora_dropout")
    if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout <= 1):
        raise _no_number(value, "lora_dropout", dropout, "a share is from 0 to 1")


def _patterns(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Its numbers by the names of layers, for messages; what is no mapping is left to PEFT, which refuses it."""
    found = settings.get(name)
    return {f"{name}.{layer}": number for layer, number in found.items()} if isinstance(found, dict) else {}


def _no_number(value: str, name: str, found: Any, rule: str) -> InputError:
    said = f"its {ADAPTER_CONFIG} says {bounded(name, 100)}={bounded(str(found), 100)}, and {rule}"
    return InputError(value, said, "Mend the file, or save the adapter again with PEFT")


def add_saved_adapter(directory: Path, model: PreTrainedModel, num_tokens: int) -> PreTrainedModel:
    """Return `model` with the adapter's layers in it, as PEFT loads them, or the method of its type.

    Args:
        directory: as `read_settings` accepts it.
        model: the base; it is changed.
        num_tokens: of the tokenizer. Where the adapter holds embeddings of more rows than the base, or of fewer, and at least
            of so many, the base is resized to them, as it was when the adapter was trained.

    Raises:
        InputError: the adapter does not fit its base, or a tensor of its file would be left out, or is not there.
    """
    if (directory / OWN_ADAPTER_CONFIG).is_file():
        return add_own_adapter(directory, model)
    value = f"model.path={directory}"
    weights = read_weights(directory, value)
    settings = read_settings_file(directory / ADAPTER_CONFIG, value)
    if (own := _opened_by(settings)) is not None:
        own.of_adapter(settings, value).put_adapter(model, weights, value)
        return model
    opened: PreTrainedModel = _opened_by_peft(directory, model, weights, num_tokens).get_base_model()
    return opened


def read_weights(directory: Path, value: str) -> dict[str, Tensor]:
    """What the adapter's file holds.

    Raises:
        InputError: it does not read, or a value is not finite.
    """
    try:
        weights = load_file(directory / ADAPTER_WEIGHTS)
    except Exception as error:  # noqa: BLE001  whatever a broken file makes the library raise
        raise InputError(value, f"its {ADAPTER_WEIGHTS} does not read ({reason(error)})", _FITS) from None
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            rule = f"its {bounded(name, 200)} holds NaN or Inf"
            raise InputError(value, rule, "Take a checkpoint from before they were lost")
    return weights


def merged_into(
    directory: Path, model: PreTrainedModel, num_tokens: int, say: Callable[[str], None]
) -> PreTrainedModel:
    """The base with a LoRA adapter merged into it by PEFT, in float32 or wider, in the base's dtype again.

    Raises:
        InputError: as of `add_saved_adapter`, or rounding to that dtype would take most of the update.
    """
    value, dtype = f"model.path={directory}", model.dtype
    weights = read_weights(directory, value)
    cast_parameters(model, torch.promote_types(dtype, torch.float32))
    opened, rounding = _opened_by_peft(directory, model, weights, num_tokens), Rounding()
    for name, layer in opened.named_modules():
        if hasattr(layer, "merge") and isinstance(getattr(layer, "base_layer", None), LINEAR):
            before = layer.base_layer.weight.detach().clone()
            layer.merge()
            rounding.add(name, before, layer.base_layer.weight.detach().clone(), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these layers are merged already
        merged: PreTrainedModel = opened.merge_and_unload()
    rounding.settle(
        f"model.dtype={str(dtype).removeprefix('torch.')}", say, "Use model.dtype=float32, or adapter_mode=keep"
    )
    cast_parameters(merged, dtype)
    return merged


def _opened_by_peft(directory: Path, model: PreTrainedModel, weights: dict[str, Tensor], num_tokens: int) -> Any:
    """PEFT's model around the base."""
    from peft import PeftModel, get_peft_model_state_dict

    value, remedy = f"model.path={directory}", _FITS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on ties and resizing; what was loaded is compared below
            _resize_to(model, weights, num_tokens)
            opened = PeftModel.from_pretrained(model, str(directory), torch_device="cpu")
            needed = get_peft_model_state_dict(opened, save_embedding_layers=False)
            placed = get_peft_model_state_dict(
                opened, save_embedding_layers=True
            )  # also those of a base that was resized
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except KeyError as error:
        raise InputError(value, f"{error} is missing from its file", "Give a whole adapter") from None
    except Exception as error:  # noqa: BLE001  each fault of the settings or the file in another library's words
        raise InputError(value, f"it does not fit its base, {reason(error)}", remedy) from None
    missing = sorted(set(needed) - set(weights))
    if missing:
        rule = f"{len(missing)} of its parameters are missing from the file: {', '.join(missing[:3])}"
        raise InputError(value, rule, "Give a whole adapter")
    for name, tensor in weights.items():
        if name not in placed or not torch.equal(placed[name], tensor.to(placed[name].dtype)):
            rule = f"its {name} {list(tensor.shape)} has no place in the model, and would be left out"
            raise InputError(value, rule, remedy)
    return opened


def _resize_to(model: PreTrainedModel, weights: dict[str, Tensor], num_tokens: int) -> None:
    """Give the base as many embeddings as the adapter's file holds."""
    table: Any = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is table)
    held = weights.get(f"{PREFIX}{name}.weight", weights.get(f"{PREFIX}{name}.base_layer.weight"))
    if held is not None and num_tokens <= len(held) != len(table.weight):
        model.resize_token_embeddings(len(held), mean_resizing=False)
