"""Hydra overrides -> `Config`, with every fault reported together.

Hydra's own `compose` stops at the first fault. Here overrides are parsed one by one; group choices are composed, then each
value is applied by itself and checked against the composed schema. Nothing in a YAML is ever instantiated.
"""

from __future__ import annotations

import dataclasses
import difflib
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tritune.trainer.config import SCHEMAS, Config, check, register
from tritune.trainer.errors import ConfigFaults

GROUPS = (*SCHEMAS, "experiment")


def load_config(overrides: list[str], config_dir: str | None = None, world_size: int | None = None) -> Config:
    """Compose the configuration, or raise `ConfigFaults` with everything that is wrong with it.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=banking77", "optim.lr=1e-3"]`.
        config_dir: a folder of the user's own groups (`experiment/mine.yaml`), searched before ours.
        world_size: number of ranks, where it is known, for the rules that need it.
    """
    config, faults = compose_partly(overrides, config_dir)
    if config is not None:
        faults = faults + check(config, world_size)
    if faults or config is None:
        raise ConfigFaults(faults)
    return config


def split_argv(argv: list[str]) -> tuple[str | None, list[str]]:
    """`[--config-dir DIR] key=value ...` -> DIR or None, and the overrides."""
    if argv[:1] == ["--config-dir"]:
        return (argv[1] if len(argv) > 1 else ""), argv[2:]
    if argv and argv[0].startswith("--config-dir="):
        return argv[0].partition("=")[2], argv[1:]
    return None, argv


def compose_partly(overrides: list[str], config_dir: str | None = None) -> tuple[Config | None, list[str]]:
    """Return the config as far as it could be composed (None if not at all) and the faults met on the way."""
    if config_dir is not None and not Path(config_dir).is_dir():
        return None, [f"--config-dir={config_dir}: the folder does not exist. Give a folder with groups such as experiment/"]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("tritune.conf", version_base="1.3"):
        search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
        choices, values, faults, failed = _sort_overrides(overrides, config_dir)
        try:
            composed = hydra_compose("config", overrides=[*search, *choices])
        except (HydraException, OmegaConfBaseException) as error:
            located = _yaml_faults(choices, config_dir)
            return None, faults + (located or [_one_line(error)])
    for override in values:
        fault = _apply(composed, override)
        if fault:
            faults.append(fault)
    if failed:  # the rules would complain of what the missing group was to give
        return None, faults
    return OmegaConf.to_object(composed), faults  # type: ignore[return-value]


def to_dict(config: Any) -> Any:
    """Config -> plain dicts, lists and scalars: what is written to `config.yaml`."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    return [to_dict(v) for v in config] if isinstance(config, list) else config


def _sort_overrides(
    overrides: list[str], config_dir: str | None
) -> tuple[list[str], list[Override], list[str], set[str]]:
    """Split into group choices, values and faults; last, the groups whose choice failed."""
    parser = OverridesParser.create()
    choices, values, faults, failed = [], [], [], set()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            faults.append(f"{text}: it does not parse. Write key=value, quoting special characters: 'key=\"a,b\"'")
            continue
        key = override.key_or_group
        if override.is_delete() or override.is_add() or override.is_force_add():
            faults.append(f"{text}: keys are neither added nor deleted here. Write {key}=value (null empties a key)")
        elif override.is_sweep_override():
            faults.append(f'{text}: a list of alternatives is a sweep. Write one value, or quote it: {key}=\'"a,b"\'')
        elif key in GROUPS:
            value = override.value()
            names = sorted(p.stem for root in _roots(config_dir) for p in (root / key).glob("*.yaml"))
            if value in names or (value is None and key == "experiment"):
                choices.append(text)
            else:
                faults.append(f"{text}: there is no such {key}. {_nearest(str(value), names)}")
                failed.add(key)
        else:
            values.append(override)
    values = [v for v in values if v.key_or_group.partition(".")[0] not in failed]  # their schema is not known
    return choices, values, faults, failed


def _roots(config_dir: str | None) -> list[Path]:
    """The folders that hold groups, the user's own first."""
    import tritune.conf

    return [*([Path(config_dir)] if config_dir else []), Path(tritune.conf.__file__).parent]


def _apply(composed: Any, override: Override) -> str | None:
    """Set one value in the composed config; return the fault, if it is one."""
    key, text = override.key_or_group, override.input_line
    group, _, rest = key.partition(".")
    if group in SCHEMAS and rest == "name":
        return f"{text}: the name follows from the group. Write {group}={override.get_value_string()}"
    fault = _unknown(key, OmegaConf.get_type(composed), composed)
    if fault:
        return f"{text}: {fault}"
    try:
        OmegaConf.update(composed, key, override.value(), force_add=True, merge=False)
    except OmegaConfBaseException as error:
        return f"{text}: {_conversion(error, composed, key)}"
    return None


def _unknown(key: str, schema: type | None, node: Any) -> str | None:
    """Say why `key` is not in the schema, with the nearest key that is; None if it is."""
    valid = _keys(schema, node)
    free = {k for k, is_mapping in valid.items() if is_mapping}
    if key in valid or any(key.startswith(f + ".") for f in free):
        return None
    return f"there is no such key. {_nearest(key, [*valid, *GROUPS] if '.' not in key else list(valid))}"


def _keys(schema: type | None, node: Any, prefix: str = "") -> dict[str, bool]:
    """Dotted keys of the schema as composed -> whether the key is a free mapping."""
    keys: dict[str, bool] = {}
    for name, hint in get_type_hints(schema).items():
        child = node._get_node(name)
        child_type = OmegaConf.get_type(child)
        if dataclasses.is_dataclass(child_type):
            keys |= _keys(child_type, child, f"{prefix}{name}.")
        else:
            keys[prefix + name] = getattr(hint, "__origin__", None) is dict
    return keys


def _nearest(wrong: str, valid: list[str]) -> str:
    last = wrong.rsplit(".", 1)[-1]
    near = [v for v in valid if v.rsplit(".", 1)[-1] == last][:1]
    near = near or difflib.get_close_matches(wrong, valid, n=1, cutoff=0.6)
    by_last = {v.rsplit(".", 1)[-1]: v for v in valid}
    near = near or [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    if near:
        return f"Did you mean {near[0]}?"
    return "There is: " + ", ".join(sorted(valid)[:12]) + (" ..." if len(valid) > 12 else "")


def _expected(composed: Any, key: str) -> str:
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(composed, parent_key) if parent_key else composed
    hint = get_type_hints(OmegaConf.get_type(parent)).get(name)
    return str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))


def _conversion(error: Exception, node: Any, key: str) -> str:
    message = _one_line(error)
    return message if "expected one of" in message else f"{message}. It expects {_expected(node, key)}"


def _one_line(error: Exception) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")


def _yaml_faults(choices: list[str], config_dir: str | None) -> list[str]:
    """Walk the chosen YAML files against the schema: Hydra names only the first unknown key of a file."""
    roots = _roots(config_dir)
    picked = {text.partition("=")[0]: text.partition("=")[2] for text in choices}
    faults: list[str] = []
    for group, name in picked.items():
        path = next((r / group / f"{name}.yaml" for r in roots if (r / group / f"{name}.yaml").is_file()), None)
        if path is None:
            continue
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            faults.append(f"{path}: it is not valid YAML ({_one_line(error)}). Mend the file")
            continue
        defaults = {k.replace("override ", "").strip("/ "): v for d in content.pop("defaults", []) if isinstance(d, dict)
                    for k, v in d.items()}
        if group == "experiment":
            schema_of = {g: SCHEMAS.get(g, {}).get(picked.get(g, defaults.get(g, ""))) for g in SCHEMAS}
            faults += _walk(content, Config, schema_of, "", str(path))
        else:
            faults += _walk({group: content}, Config, {group: SCHEMAS[group].get(name)}, "", str(path))
    return faults


def _walk(content: Any, schema: type, schema_of: dict[str, type | None], prefix: str, path: str) -> list[str]:
    if not isinstance(content, dict):
        return [f"{path}: {prefix.rstrip('.') or 'the file'} is not a mapping. Write keys and values"]
    hints, faults = get_type_hints(schema), []
    for name, value in content.items():
        hint = schema_of.get(prefix + name) or hints.get(name)
        if hint is None:
            faults.append(f"{path}: {prefix}{name}: there is no such key. "
                          f"{_nearest(prefix + name, [prefix + h for h in hints])}")
        elif dataclasses.is_dataclass(hint):
            faults += _walk(value, hint, {}, f"{prefix}{name}.", path)  # type: ignore[arg-type]
        else:
            probe = OmegaConf.structured(schema)
            try:
                OmegaConf.update(probe, name, value)
            except OmegaConfBaseException as error:
                faults.append(f"{path}: {prefix}{name}={value}: {_conversion(error, probe, name)}")
    return faults
