"""What prefix and prompt tuning have in common: PEFT's layout of their adapters, and what of a model they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.trainer.config import MethodConfig
from tritune.trainer.errors import InputError
from tritune.trainer.methods.states import Read
from tritune.trainer.model.files import ADAPTER_CONFIG
from tritune.trainer.shown import bounded

EMBEDDINGS = "prompt_embeddings"
HEAD = "base_model."  # PEFT puts no layers into the model for these methods, so its names have one part less
_MOST_TOKENS = 1_000_000
# Settings that say nothing of what is computed, or only what the tensors' shapes say too.
_SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "modules_to_save",
}  # fmt: skip


def decoder_of(model: PreTrainedModel) -> Any:
    """What turns tokens into hidden states."""
    return getattr(model, model.base_model_prefix)


def past_length(given: dict[str, Any]) -> int:
    """Tokens in the cache among a decoder's arguments; transformers 5.24 calls `cache` what was `past_key_values` before."""
    cache = given.get("cache") if given.get("cache") is not None else given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def release_heads(model: nn.Module, heads: list[str]) -> None:
    """Let new heads train beside a frozen base."""
    for name in heads:
        model.get_submodule(name).requires_grad_(True)


def require_text_alone(config: MethodConfig, model: PreTrainedModel) -> None:
    """Refuse models whose decoder takes in more than tokens.

    Raises:
        InputError: it sees images, or looks tokens up in each layer.
    """
    text, remedy = model.config.get_text_config(), "Use method=lora"
    if text is not model.config:
        rule = f"{model.config.model_type} takes in more than text, and virtual tokens have no place among images"
        raise InputError(f"method={config.name}", rule, remedy)
    if getattr(text, "hidden_size_per_layer_input", None):
        rule = f"{model.config.model_type} looks its tokens up in every layer, where virtual tokens have no entry"
        raise InputError(f"method={config.name}", rule, remedy)


def tensors_of(model: nn.Module, embeddings: Tensor, heads: list[str], read: Read) -> dict[str, Tensor]:
    """What an adapter's file holds, under PEFT's names."""
    tensors = {EMBEDDINGS: embeddings}
    for name in heads:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[f"{HEAD}{name}.{key}"] = read(value)
    return tensors


def require_known(settings: dict[str, Any], also: set[str], value: str) -> None:
    """Refuse settings that might ask for something else than what is computed here.

    Raises:
        InputError: with their names.
    """
    foreign = sorted(n for n, v in settings.items() if v and n not in _SILENT | also)
    if settings.get("num_transformer_submodules") in (None, 1):
        foreign = [n for n in foreign if n != "num_transformer_submodules"]
    if foreign:
        rule = f"it is a {settings.get('peft_type')} adapter with {bounded(', '.join(foreign), 200)}"
        raise InputError(value, rule, "Give one without these: what they compute is not known here")


def num_virtual_tokens(settings: dict[str, Any], value: str) -> int:
    """The adapter's number of virtual tokens.

    Raises:
        InputError: it is no number above 0.
    """
    found = settings.get("num_virtual_tokens")
    if type(found) is not int or not 0 < found <= _MOST_TOKENS:
        rule = (
            f"its {ADAPTER_CONFIG} says num_virtual_tokens={bounded(str(found), 100)}, and it is a whole number above 0"
        )
        raise InputError(value, rule, "Mend the file, or save the adapter again with PEFT")
    return found


@torch.no_grad()
def put(
    method: MethodConfig,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    place: Callable[[Tensor], None],
    value: str,
) -> None:
    """Put the method on `model`, with the values of an adapter's file.

    Args:
        place: takes the virtual tokens.
        value: what a message is about.

    Raises:
        InputError: a tensor is missing, has no place, or another shape.
    """
    remedy = "Check that base_model_name_or_path is its base, and that the file is whole"
    if EMBEDDINGS not in tensors:
        raise InputError(value, f"its file holds no {EMBEDDINGS}", "Give a whole adapter")
    method.attach(model, [], 0, ())
    try:
        place(tensors[EMBEDDINGS])
    except ValueError as error:
        raise InputError(value, f"its {EMBEDDINGS} does not fit its base: {error}", remedy) from None
    places = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name == EMBEDDINGS:
            continue
        parameter = places.get(name.removeprefix(HEAD))
        if parameter is None or parameter.shape != tensor.shape:
            rule = f"its {bounded(name, 200)} {list(tensor.shape)} has no place in the model, and would be left out"
            raise InputError(value, rule, remedy)
        parameter.copy_(tensor)
