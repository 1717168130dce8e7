"""The generation config that goes with a model: where answers stop, and nothing that transformers would refuse to save."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.files import find_file
from tritune.trainer.model.tokenizer import stop_token_ids

# Other settings are judged by these, so they are tried first.
_FIRST = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def model_stop_ids(config: ModelConfig, architecture: PreTrainedConfig) -> list[int]:
    """The ids at which the model's own generation config, or its architecture, ends an answer; no weight is read.

    Raises:
        InputError: a generation config is there and cannot be read.
    """
    found: list[Any] = [getattr(architecture.get_text_config(), "eos_token_id", None)]
    try:
        if config.path is not None:
            file = find_file(config.path, GENERATION_CONFIG_NAME, config.revision)
            if file is not None:  # many models have none
                found.append(GenerationConfig.from_pretrained(file.parent).eos_token_id)
        ids = {i for entry in found for i in (entry if isinstance(entry, list) else [entry]) if i is not None}
        if not all(type(i) is int for i in ids):
            raise TypeError(f"eos_token_id is {found[-1]}, and an id is a whole number")
    except Exception as error:  # noqa: BLE001  whatever a broken file makes the library raise
        rule = f"its {GENERATION_CONFIG_NAME} cannot be read ({reason(error)})"
        raise InputError(f"model.path={config.path}", rule, "Mend that file, or remove it") from None
    return sorted(ids)


def read_generation(model: PreTrainedModel, config: ModelConfig) -> None:
    """Give a model that was made from its config alone the generation config that `from_pretrained` would: of its own file, or
    of what its config.json says of generation."""
    if config.path is None or not model.can_generate():
        return
    own: Any = model
    try:
        own.generation_config = GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
    except OSError:
        own.generation_config = GenerationConfig.from_pretrained(
            config.path, config_file_name=CONFIG_NAME, _from_model_config=True, revision=config.revision or "main"
        )


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let the exported model stop where it was trained to, and pad with the token chosen here.

    Returns:
        what was taken out of its generation config, as `key=value`: published configs hold settings that contradict one
        another (a temperature without sampling), which transformers loads and then refuses to save.
    """
    generation: GenerationConfig = model.generation_config  # type: ignore[assignment]
    generation.eos_token_id = stop_token_ids(tokenizer, generation.eos_token_id) or None
    generation.pad_token_id = tokenizer.pad_token_id
    return drop_unsavable(generation)


def drop_unsavable(generation: GenerationConfig) -> list[str]:
    """Put back to its default every setting with which `generation` could not be saved; the others stay as they are.

    Settings are added to a default config one by one, so that only those go which do not fit the others. What goes has no say
    in what the model generates: transformers ignores it, or fails on it.
    """
    default, kept = GenerationConfig(), GenerationConfig()
    settings = sorted(generation.to_diff_dict(), key=lambda key: (key not in _FIRST, key))
    dropped = []
    for key in settings:
        before, value = getattr(kept, key, None), getattr(generation, key, None)
        setattr(kept, key, value)
        try:
            kept.validate(strict=True)
            kept.to_json_string()
        except Exception:  # noqa: BLE001  a wrong type makes it raise whatever comparing it raises
            setattr(kept, key, before)
            dropped.append(f"{key}={value}")
            setattr(generation, key, getattr(default, key, None))
    return dropped
