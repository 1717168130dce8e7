"""Load the Hugging Face model: architecture first, so that faults are seen before weights are read."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging
from tritune.trainer.config import MethodConfig, ModelConfig, ObjectiveConfig
from tritune.trainer.config.axes import Head
from tritune.trainer.config.choices import Dtype
from tritune.trainer.config.registry import saying_labels, with_class_head
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.files import find_adapter_config, weight_files
from tritune.trainer.model.finite import require_finite
from tritune.trainer.model.folder import require_computable, require_sound
from tritune.trainer.model.quantized import quantized_layers

CLASS_HEAD = "score"  # the name transformers gives the head of a decoder's sequence classifier


def load_architecture(config: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """Return the model's own config; no weight is read.

    Raises:
        InputError: nothing there, an adapter, or an architecture that transformers does not know.
    """
    if config.config:
        settings = {"vocab_size": vocab_size, **config.config}
        model_type = settings.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Use e.g. llama"
            raise InputError(f"model.config.model_type={model_type}", "transformers knows no such architecture", remedy)
        try:
            default = AutoConfig.for_model(model_type)
            known = sorted({*default.to_dict(), *default.attribute_map})
            for key in settings:
                if key not in known:
                    near = difflib.get_close_matches(key, known, n=1)
                    hint = f"Did you mean model.config.{near[0]}?" if near else f"It has {', '.join(known[:12])} ..."
                    raise InputError(f"model.config.{key}", f"a {model_type} config has no such key", hint)
            require_computable(settings, "model.config")
            return AutoConfig.for_model(model_type, **settings)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  each family checks its values in its own way
            raise InputError(f"model.config={config.config}", reason(error), "Give it the values it takes") from None
    assert config.path is not None, "config.check() requires one of the two"
    require_sound(config.path, f"model.path={config.path}")
    if (adapter := find_adapter_config(config.path, config.revision)) is not None:
        rule = f"it is an adapter, or a model with one in it ({adapter.name}), and a whole model is read here"
        remedy = f"Give its base, or a model with the adapter merged into it; in a whole model, remove {adapter.name}"
        raise InputError(f"model.path={config.path}", rule, remedy)  # transformers would add the adapter without a word
    try:
        architecture = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
        inner = architecture.get_text_config()
        if not isinstance(inner, PreTrainedConfig):
            raise TypeError(f"its text config is a {type(inner).__name__}")
    except Exception as error:  # noqa: BLE001  whatever a broken file makes the libraries raise
        remedy = "Give a folder with config.json, or a hub id that this machine can reach; code of a repo is never run"
        raise InputError(f"model.path={config.path}", f"no model loads from it ({reason(error)})", remedy) from None
    if getattr(architecture, "transformers_weights", None):
        rule = f"its config.json asks for weights in {architecture.transformers_weights}"
        raise InputError(
            f"model.path={config.path}", rule, "Remove transformers_weights; safetensors are found by name"
        )
    return architecture


def heads_of(objective: ObjectiveConfig) -> list[str]:
    """The modules that are new for an objective."""
    return [CLASS_HEAD] if objective.head is Head.classes else []


def context_length(architecture: PreTrainedConfig, taken: int = 0) -> int | None:
    """Positions that the model has for a document's tokens, or None where it sets no limit.

    Args:
        taken: positions that the method has before them.

    Raises:
        InputError: none is left.
    """
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= taken:
        rule = f"the model has {positions} positions, and none is left for text"
        raise InputError(f"method.num_virtual_tokens={taken}", rule, f"Use at most a tenth, {max(positions // 10, 1)}")
    return positions - taken


def room_in(model: PreTrainedModel) -> int | None:
    """`context_length` of a model with its method attached, which says on it what it takes."""
    return context_length(model.config, getattr(model, "positions_taken", 0))


def load_model(
    config: ModelConfig,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return the model on CPU, parameters in `dtype`, embeddings resized to the tokenizer.

    Args:
        labels: class names for a sequence classifier; None for a language model.
        seed: of every weight that the checkpoint does not hold (a new head, a whole model from a config).

    Raises:
        InputError: there are no safetensors, weights are missing from them or no finite numbers, or the family has no such head.
    """
    if labels is not None and architecture.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        rule = f"transformers has no classifier of {architecture.model_type}"
        raise InputError(
            f"objective={with_class_head().name}",
            rule,
            f"Use objective={saying_labels().name}, which needs no new head",
        )
    if config.path is not None:
        weight_files(config.path, config.revision)
    auto = settle_architecture(architecture, tokenizer, labels)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": config.attention.value, "dtype": dtype}
    hf_logging.set_verbosity_error()  # its report of new and unused weights: we check these ourselves
    hf_logging.disable_progress_bar()
    try:
        if config.config:
            model = auto.from_config(architecture, **options)
            missing: set[str] = set()
        else:
            model, info = auto.from_pretrained(
                config.path, revision=config.revision, config=architecture, output_loading_info=True,
                use_safetensors=True, trust_remote_code=False, **options,
            )  # fmt: skip
            missing = set(info["missing_keys"])
            if labels is not None and missing - {f"{CLASS_HEAD}.weight"}:
                # A tied checkpoint may hold the shared matrix under the output head's name, which a classifier does not
                # have: loaded directly, its embeddings would start random. The language model knows both names.
                causal, info = auto_class(architecture, False).from_pretrained(
                    config.path, revision=config.revision, config=architecture, output_loading_info=True,
                    use_safetensors=True, trust_remote_code=False, **options,
                )  # fmt: skip
                setattr(model, model.base_model_prefix, causal.base_model)
                missing = set(info["missing_keys"])
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  whatever a broken file makes the libraries raise
        remedy = "It must hold whole safetensors weights of this architecture; model.attention=eager suits every family"
        raise InputError(f"model.path={config.path}", reason(error), remedy) from None
    missing -= {f"{CLASS_HEAD}.weight"} if labels is not None else set()
    if missing:
        names = ", ".join(sorted(missing)[:3])
        rule = f"{len(missing)} weight(s) are missing from it and would start random: {names}"
        raise InputError(f"model.path={config.path}", rule, "Give a whole checkpoint")
    if config.path is not None:
        require_finite(model, f"model.path={config.path}")
    if labels is not None and not isinstance(getattr(model, CLASS_HEAD, None), nn.Linear):
        rule = f"a {architecture.model_type} classifier has no linear head named {CLASS_HEAD}"
        raise InputError(
            f"objective={with_class_head().name}", rule, f"Use objective={saying_labels().name}, which needs none"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not config.config)
    return model


def settle_architecture(
    architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None
) -> Any:
    """Put tokenizer and labels into the model's own config; return transformers' class for it."""
    architecture.pad_token_id = architecture.get_text_config().pad_token_id = tokenizer.pad_token_id
    architecture.use_cache = False
    if labels is None:
        return auto_class(architecture, False)
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {label: i for i, label in enumerate(labels)}
    return auto_class(architecture, True)


def auto_class(architecture: PreTrainedConfig, classifier: bool) -> Any:
    """Transformers' class that loads such a model.

    One that sees images as well is loaded with all it has, although only text is trained: as a plain language model, which
    some families have for the same files, it would lose its vision tower without a word.
    """
    if classifier:
        return AutoModelForSequenceClassification
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(architecture.model_type)
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(architecture.model_type)
    whole = causal is None or seeing in (architecture.architectures or [])
    return AutoModelForImageTextToText if seeing not in (None, causal) and whole else AutoModelForCausalLM


def storage_dtype(dtype: Dtype, method: MethodConfig) -> torch.dtype:
    """What parameters are held in: float32 masters where everything trains; a base that stays frozen, as it computes."""
    if dtype is Dtype.float64:
        return torch.float64
    return torch.bfloat16 if dtype is Dtype.bfloat16 and method.freezes_base else torch.float32


def widen_masters(model: nn.Module) -> None:
    """Hold what trains in float32 where it came in less: masters are never below it."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()


def narrow_frozen(model: nn.Module, dtype: Dtype) -> None:
    """Hold what is frozen as it computes: in bfloat16 no master of it is needed."""
    for parameter in model.parameters() if dtype is Dtype.bfloat16 else ():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters in place, and no buffer: in bfloat16 a rotary frequency puts far positions elsewhere."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input embeddings and output head are one tensor."""
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # an adapter may be around it
    return head is not None and head.weight is model.get_input_embeddings().weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; shared ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    packed = sum(layer.shape.numel() - layer.nf4.numel() for layer in quantized_layers(model).values())
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + packed
