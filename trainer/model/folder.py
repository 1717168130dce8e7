"""A model's or an adapter's folder before a library reads it: regular files, settings that are settings, sane numbers.

The libraries read what they find: a pipe without an end, a config that asks for a hundred million labels.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tritune.trainer.errors import InputError, reason
from tritune.trainer.shown import bounded

CONFIG = "config.json"
_SETTINGS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "tritune_adapter.json",
)
_READ = {".json", ".jinja", ".safetensors", ".model", ".txt"}  # endings of what the libraries look for
_MOST_BYTES = 10_000_000  # of settings; a tokenizer_config.json with a thousand added tokens has 200,000
_MOST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "num_layers": 10_000, "num_labels": 1_000_000}
_ABOVE_ZERO = (
    "norm_eps",
    "norm_epsilon",
    "rope_theta",
)  # ends of names, of which the last also stands in rope_parameters
_REMEDY = "Download it anew from a source that you trust"


def require_sound(path: str | Path, value: str) -> None:
    """Refuse what a library would read without an end, or take for something else. A hub id is left to its client.

    Args:
        value: what the user gave, for the message: `model.path=...`.

    Raises:
        InputError: it names the file and, in config.json, the key.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    try:
        entries = sorted(e for e in folder.iterdir() if e.suffix in _READ)
    except OSError as error:
        raise InputError(value, f"the folder cannot be read ({error.strerror})", "Check its permissions") from None
    for entry in entries:
        if not entry.is_file():
            raise InputError(value, f"its {entry.name} is no regular file", "Give a folder of regular files")
    for name in _SETTINGS:
        if (folder / name).is_file():
            settings = read_settings_file(folder / name, value)
            if name == CONFIG:
                _require_sane(settings, value, "")


def read_settings_file(file: Path, value: str) -> dict[str, Any]:
    """The JSON mapping that a file of settings holds.

    Raises:
        InputError: it is not there, too large, no JSON, or no mapping.
    """
    try:
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise InputError(
                value, f"its {file.name} has {size:,} bytes, and settings have no more than 10 MB", _REMEDY
            )
        settings = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(value, f"its {file.name} does not read (it nests too deeply)", _REMEDY) from None
    except (OSError, ValueError) as error:
        raise InputError(value, f"its {file.name} does not read ({reason(error)})", _REMEDY) from None
    if not isinstance(settings, dict):
        raise InputError(value, f"its {file.name} holds a {type(settings).__name__} and no settings", _REMEDY)
    return settings


def _require_sane(config: dict[str, Any], value: str, prefix: str) -> None:
    """Refuse numbers that would be built before anything looks at them or give no numbers, and values that nothing reads."""
    require_computable(config, value, f"its {CONFIG} says {prefix}")
    if config.get("quantization_config") is not None:
        found = config["quantization_config"]
        method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found
        rule = f"its weights are quantised ({bounded(str(method), 100)}), and whole ones are read and trained here"
        raise InputError(value, rule, "Give the model that it was quantised from")
    for key, most in _MOST.items():
        if isinstance(config.get(key), int) and config[key] > most:
            raise _unsound(value, f"{prefix}{key}", config[key], f"there are at most {most:,}")
    for key, number in config.items():
        if key.endswith(("dropout", "pdrop")) and isinstance(number, int | float) and not 0 <= number <= 1:
            raise _unsound(value, f"{prefix}{key}", number, "a share is from 0 to 1")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _unsound(value, f"{prefix}architectures", names, "it is a list of names")
    if config.get("return_dict") is False or config.get("torchscript"):
        key = "return_dict" if config.get("return_dict") is False else "torchscript"
        raise _unsound(value, f"{prefix}{key}", config[key], "outputs are read by name here")
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict) and not prefix:
            _require_sane(part, value, f"{key}.")


def require_computable(config: dict[str, Any], value: str, said: str = "") -> None:
    """Refuse settings at any depth with which every output is NaN: what is divided by them, or taken to a power.

    Args:
        value: what the user gave. said: what stands before a key in the message.

    Raises:
        InputError: it names the key.
    """
    for key, number in config.items():
        if isinstance(number, dict):
            require_computable(number, value, f"{said}{key}.")
        elif key.endswith(_ABOVE_ZERO) and type(number) in (int, float) and not 0 < number < math.inf:
            rule = f"{said}{key}={number}, and it is a finite number above 0"
            raise InputError(value, rule, "Mend the setting, or download it anew")


def _unsound(value: str, key: str, found: Any, rule: str) -> InputError:
    said = f"its {CONFIG} says {key}={bounded(str(found), 100)}, and {rule}"
    return InputError(value, said, "Mend the file, or download it anew")
