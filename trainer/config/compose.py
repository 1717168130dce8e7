"""Hydra overrides -> `Config`, with every fault reported together.

Hydra's own `compose` stops at the first fault. Here overrides are parsed one by one; group choices are composed, then each
value is applied by itself and checked against the composed schema. Nothing in a YAML is ever instantiated.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from tritune.trainer.config.check import check
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.config.registry import AXES, axis_options, load_plugins
from tritune.trainer.config.renamed import RENAMED, is_old, renamed_override, renamed_tree, settle_old_names
from tritune.trainer.config.schema import GROUPS, Config, register
from tritune.trainer.config.yaml_faults import conversion, key_types, nearest, one_line, options, yaml_faults
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.shown import bounded

SOURCES = "data.sources."
WHERE = ("backend", "kernels", "launch")  # groups that say where and by what a model computes, and not which model
_BY_HAND = "only the command line names Python files that are run. Give plugins=[FILE,...] there"
# Hydra's parser takes a second for so much.
MOST_CHARACTERS, MOST_WORDS = 20_000, 1_000


def load_config(
    overrides: list[str],
    config_dir: str | None = None,
    world_size: int | None = None,
    kept: dict[str, Any] | None = None,
    training: bool = True,
) -> Config:
    """Compose the configuration, or raise `ConfigFaults` with everything that is wrong with it.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=banking77", "optim.lr=1e-3"]`.
        config_dir: a folder of the user's own groups (`experiment/mine.yaml`), searched before ours.
        world_size: number of ranks, where it is known, for the rules that need it.
        kept: the `config.yaml` of a run, which the overrides then change.
        training: whether the rules for training must hold, too.
    """
    config, faults = compose_partly(overrides, config_dir, kept)
    if config is not None:
        faults = faults + unheld_rules(config, faults, world_size, training)
    if faults or config is None:
        raise ConfigFaults(faults)
    return config


def unheld_rules(config: Config, faults: list[str], world_size: int | None = None, training: bool = True) -> list[str]:
    """`check`'s faults, without those of keys whose given value could not be set: they have a fault already."""
    named = {fault.partition("=")[0] for fault in faults}
    return [fault for fault in check(config, world_size, training) if fault.partition("=")[0] not in named]


def split_argv(argv: list[str]) -> tuple[str | None, list[str]]:
    """`[--config-dir DIR] key=value ...` -> DIR or None, and the overrides."""
    if argv[:1] == ["--config-dir"]:
        return (argv[1] if len(argv) > 1 else "(nothing)"), argv[2:]
    if argv and argv[0].startswith("--config-dir="):
        return argv[0].partition("=")[2], argv[1:]
    return None, argv


def compose_partly(
    overrides: list[str], config_dir: str | None = None, kept: dict[str, Any] | None = None
) -> tuple[Config | None, list[str]]:
    """Return the config as far as it could be composed (None if not at all) and the faults met on the way."""
    if config_dir is not None and not Path(config_dir).is_dir():
        return None, [
            f"--config-dir={config_dir}: the folder does not exist. Give a folder with groups such as experiment/"
        ]
    unread = _load_plugins(overrides, kept)
    if unread is not None:
        return None, [unread]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("tritune.conf", version_base="1.3"):
        search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
        choices, values, faults, failed = _sort_overrides(overrides, config_dir)
        if kept is not None:
            anew = {c.partition("=")[0]: c for c in choices if c.partition("=")[0] in WHERE}
            faults += [
                f"{c}: the run has a whole configuration. Override single keys"
                for c in choices
                if c not in anew.values()
            ]
            kept = {group: value for group, value in kept.items() if group not in anew}
            # A run's model is whatever its file says; the other groups' options bring the schema.
            names = {g: kept[g].get("name") for g in GROUPS if isinstance(kept.get(g), dict)}
            choices = [*anew.values()] + [f"{g}={name}" for g, name in names.items() if name in options(g, config_dir)]
        located = yaml_faults(choices, config_dir)
        try:
            composed = hydra_compose("config", overrides=[] if located else [*search, *choices])
        except Exception as error:  # noqa: BLE001  whatever a broken file makes the libraries raise
            located = [one_line(error)]
            composed = hydra_compose("config")
        if located:
            faults += located
            failed |= {"experiment", *AXES}  # which keys these have is not known now
    if not located:
        settle_old_names(composed)
        if composed.plugins:
            faults.append(f"plugins={composed.plugins} in a YAML: {_BY_HAND}")
    if kept is not None and not failed:
        try:
            OmegaConf.set_struct(composed, False)  # for free mappings; a schema refuses unknown keys all the same
            composed = OmegaConf.merge(composed, renamed_tree(kept))  # type: ignore[assignment]
        except Exception as error:  # noqa: BLE001  whatever a spoilt file makes the library raise
            return None, [*faults, f"config.yaml of the run: {one_line(error)}. It was written by another version"]
    valid = _keys(Config, composed)
    for override in values:
        if override.key_or_group.partition(".")[0] not in failed:
            fault = _apply(composed, override, valid)
            if fault:
                faults.append(fault)
    unresolved = _unresolved(OmegaConf.to_container(composed, resolve=False))
    faults += unresolved
    if failed or unresolved:  # the rules would complain of what the missing group was to give
        return None, faults
    try:
        return OmegaConf.to_object(composed), faults  # type: ignore[return-value]
    except Exception as error:  # noqa: BLE001  whatever a spoilt file makes the library raise
        return None, faults or [one_line(error)]


def to_dict(config: Any) -> Any:
    """Config -> plain dicts, lists and scalars: what is written to `config.yaml`."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if not is_old(f)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    return [to_dict(v) for v in config] if isinstance(config, list) else config


def _load_plugins(overrides: list[str], kept: dict[str, Any] | None) -> str | None:
    """Read the users' own files that the command line names; return the fault, if there is one.

    Args:
        kept: of the run that is read: a file that it names and the command line does not is never run.
    """
    given: list[str] = []
    for text in overrides:
        if text.startswith("plugins="):
            try:
                value: Any = OverridesParser.create().parse_override(text).value()
            except HydraException:
                value = None
            given = [str(name) for name in value] if isinstance(value, list) else []
            if not given and value != []:
                return f"{text}: it is a list of Python files. Write plugins=[FILE,...]"
    try:
        load_plugins(given)
    except InputError as error:
        return str(error)
    for axis in AXES:
        group = (kept or {}).get(axis)
        name = group.get("name") if isinstance(group, dict) else None
        if name is not None and name not in axis_options(axis):
            said = f"{axis}={name} in config.yaml of the run"
            if not (kept or {}).get("plugins"):
                return f"{said}: there is no such {axis}. It was written by another version"
            return f"{said}: no option that is loaded is called so. It was in {kept['plugins']}: {_BY_HAND}, where you trust it"  # type: ignore[index]
    return None


def _sort_overrides(
    overrides: list[str], config_dir: str | None
) -> tuple[list[str], list[Override], list[str], set[str]]:
    """Split into group choices, values and faults; last, the groups whose choice failed."""
    parser = OverridesParser.create()
    choices, values, faults, failed = [], [], [], set()
    if len(overrides) > MOST_WORDS:
        rule = (
            f"there are {len(overrides):,}, and at most {MOST_WORDS:,} are read. Put them into a YAML of --config-dir"
        )
        return [], [], [f"overrides: {rule}"], set()
    for text in overrides:
        if len(text) > MOST_CHARACTERS:
            rule = f"it has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read"
            faults.append(f"{bounded(text)}: {rule}. Put it into a YAML of --config-dir")
            continue
        try:
            override = parser.parse_override(text)
        except ValueError:
            faults.append(f"{text}: it holds a number of too many digits. Use a smaller one, or quote it as text")
            continue
        except (HydraException, RecursionError):
            faults.append(f"{text}: it does not parse. Write key=value, quoting special characters: 'key=\"a,b\"'")
            continue
        key = override.key_or_group
        if override.is_delete() or override.is_add() or override.is_force_add():
            faults.append(f"{text}: keys are neither added nor deleted here. Write {key}=value (null empties a key)")
        elif override.is_sweep_override():
            faults.append(f"{text}: a list of alternatives is a sweep. Write one value, or quote it: {key}='\"a,b\"'")
        elif override.package is not None:
            faults.append(f"{text}: groups keep their place here. Write {key}={override.get_value_string()}")
        elif key in GROUPS:
            value = override.value()
            names = options(key, config_dir)
            if value in names or (value is None and key == "experiment"):
                choices.append(text)
            else:
                faults.append(f"{text}: there is no such {key}. {nearest(str(value), names)}")
                failed.add(key)
        else:
            values.append(renamed_override(override))
    return choices, values, faults, failed


def _apply(composed: Any, override: Override, valid: dict[str, bool]) -> str | None:
    """Set one value in the composed config, whose keys are `valid`; return the fault, if it is one."""
    key, text = override.key_or_group, override.input_line
    group, _, rest = key.partition(".")
    if group in GROUPS and rest == "name":
        return f"{text}: the name follows from the group. Write {group}={override.get_value_string()}"
    if key.startswith(SOURCES):
        return _apply_to_source(composed, override)
    fault = _unknown(key, valid)
    if fault:
        return f"{text}: {fault}"
    try:
        OmegaConf.update(composed, key, override.value(), force_add=True, merge=False)
    except OmegaConfBaseException as error:
        return f"{text}: {conversion(error, composed, key)}"
    return None


def _apply_to_source(composed: Any, override: Override) -> str | None:
    """Set a key of a source of `data.sources`, which the first key that names it makes."""
    name, _, key = override.key_or_group.removeprefix(SOURCES).partition(".")
    keys = [f.name for f in dataclasses.fields(SourceConfig)]
    whole, _, column = key.partition(".")
    if key not in keys and (whole != "columns" or not column or "." in column):
        known = nearest(f"{SOURCES}{name}.{key or 'path'}", [f"{SOURCES}{name}.{k}" for k in keys])
        return f"{override.input_line}: there is no such key. {known}"
    unresolved = _unresolved(override.value(), f"{SOURCES}{name}.{key}.")
    if unresolved:
        return unresolved[0]
    probe = OmegaConf.structured(SourceConfig)
    try:
        OmegaConf.update(probe, key, override.value(), force_add=True)
    except OmegaConfBaseException as error:
        return f"{override.input_line}: {conversion(error, probe, key)}"
    sources = composed.data.sources
    with open_dict(sources):
        if name not in sources:
            sources[name] = SourceConfig()
        if column:
            sources[name][whole][column] = probe[whole][column]
        else:
            sources[name][key] = probe[key]
    return None


def _unresolved(node: Any, prefix: str = "") -> list[str]:
    """Interpolations and `???`: they could read the environment into a config that is written down, or fail late."""
    if isinstance(node, dict):
        return [f for k, v in node.items() for f in _unresolved(v, f"{prefix}{k}.")]
    if isinstance(node, list):
        return [f for v in node for f in _unresolved(v, prefix)]
    if isinstance(node, str) and ("${" in node or node == "???"):
        return [f"{prefix.rstrip('.')}={node}: interpolations are not read here. Write the value itself"]
    return []


def _unknown(key: str, valid: dict[str, bool]) -> str | None:
    """Say why `key` is not in the schema, with the nearest key that is; None if it is."""
    free = {k for k, is_mapping in valid.items() if is_mapping}
    if key in valid or any(key.startswith(f + ".") for f in free):
        return None
    return f"there is no such key. {nearest(key, [*valid, *GROUPS] if '.' not in key else list(valid))}"


def _keys(schema: type, node: Any, prefix: str = "") -> dict[str, bool]:
    """Dotted keys of the schema as composed -> whether the key is a free mapping."""
    keys: dict[str, bool] = {}
    for name, hint in key_types(schema).items():
        if prefix + name in RENAMED:
            continue
        child = node._get_node(name)
        child_type = OmegaConf.get_type(child)
        if dataclasses.is_dataclass(child_type):
            keys |= _keys(child_type, child, f"{prefix}{name}.")
        else:
            keys[prefix + name] = getattr(hint, "__origin__", None) is dict
    return keys
