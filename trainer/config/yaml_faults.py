"""Find what is wrong in a YAML file of the user's, fault by fault: Hydra names only the first unknown key."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tritune.trainer.config.registry import AXES, plugin_options
from tritune.trainer.config.schema import GROUPS, Config, schemas
from tritune.trainer.config.yaml_file import read_yaml
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded


def roots(config_dir: str | None) -> list[Path]:
    """The folders that hold groups, the user's own first."""
    import tritune.conf

    return [*([Path(config_dir)] if config_dir else []), Path(tritune.conf.__file__).parent]


def nearest(wrong: str, valid: list[str]) -> str:
    last = wrong.rsplit(".", 1)[-1]
    near = [v for v in valid if v.rsplit(".", 1)[-1] == last][:1]
    near = near or difflib.get_close_matches(wrong, valid, n=1, cutoff=0.6)
    by_last = {v.rsplit(".", 1)[-1]: v for v in valid}
    near = near or [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    if near:
        return f"Did you mean {near[0]}?"
    return "There is: " + ", ".join(sorted(valid)[:12]) + (" ..." if len(valid) > 12 else "")


def expected(composed: Any, key: str) -> str:
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(composed, parent_key) if parent_key else composed
    hint = get_type_hints(OmegaConf.get_type(parent)).get(name)
    return str(hint).removesuffix(" | None") if get_args(hint) else getattr(hint, "__name__", str(hint))


def conversion(error: Exception, node: Any, key: str) -> str:
    message = one_line(error)
    return message if "expected one of" in message else f"{message}. It expects {expected(node, key)}"


def one_line(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return bounded(lines[0].rstrip(".") if lines else type(error).__name__)


def options(group: str, config_dir: str | None) -> list[str]:
    """What can be chosen in a group."""
    plugins = plugin_options(group) if group in AXES else {}
    return sorted([*plugins, *(p.stem for root in roots(config_dir) for p in (root / group).glob("*.yaml"))])


def key_types(schema: type) -> dict[str, Any]:
    """Name -> type of each key of a group; what else its class holds is none."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def yaml_faults(choices: list[str], config_dir: str | None) -> list[str]:
    """Faults of the YAML files that `choices` (`group=name`) pick: syntax, unknown groups, options, keys, wrong types."""
    picked = {text.partition("=")[0]: text.partition("=")[2] for text in choices}
    faults: list[str] = []
    seen: set[Path] = set()
    for group, name in picked.items():
        path = _file(group, name, config_dir)
        if path is None:
            continue
        try:
            text, content = read_yaml(path)
        except InputError as error:
            faults.append(str(error))
            continue
        content = {} if content is None else content
        if not isinstance(content, dict):
            faults.append(
                f"{path}: it is a {type(content).__name__}, and must be a mapping of keys to values. Mend the file"
            )
            continue
        seen.add(path)
        broken = _unread(group, content, config_dir, seen)
        if broken:
            faults += broken
        elif group == "experiment":
            faults += _experiment_faults(path, text, content, picked, config_dir)
        else:
            entries = content.pop("defaults", None)
            bases = [str(d).removeprefix("schema_") for d in (entries if isinstance(entries, list) else [])]
            of_group = schemas()[group]
            known = [of_group[b] for b in [*bases, name] if b in of_group]
            schema = known[0] if known else next(iter(of_group.values()))
            faults += _walk({group: content}, Config, {group: schema}, "", str(path))
    return faults


def _file(group: str, name: str, config_dir: str | None) -> Path | None:
    return next((p for root in roots(config_dir) if (p := root / group / f"{name}.yaml").is_file()), None)


def _unread(group: str, content: dict[str, Any], config_dir: str | None, seen: set[Path]) -> list[str]:
    """Faults of the files that a file's defaults bring, and those of theirs: Hydra would read them without a bound."""
    entries = content.get("defaults")
    faults: list[str] = []
    for entry in entries if isinstance(entries, list) else []:
        for key, option in entry.items() if isinstance(entry, dict) else [("", entry)]:
            other = str(key).replace("override", "").replace("optional", "").partition("@")[0].strip("/ ") or group
            for name in option if isinstance(option, list) else [option]:
                path = _file(other, str(name), config_dir)
                if path is None or path in seen:
                    continue
                seen.add(path)
                try:
                    below = read_yaml(path)[1]
                except InputError as error:
                    faults.append(str(error))
                    continue
                faults += _unread(other, below, config_dir, seen) if isinstance(below, dict) else []
    return faults


def _experiment_faults(
    path: Path, text: str, content: dict[str, Any], picked: dict[str, str], config_dir: str | None
) -> list[str]:
    faults = []
    if "@package _global_" not in text:
        faults.append(f"{path}: its keys would land below `experiment`. Begin the file with: # @package _global_")
    defaults, wrong = _defaults(content.pop("defaults", None) or [], config_dir, str(path))
    schema_of = {g: options.get(picked.get(g, defaults.get(g, ""))) for g, options in schemas().items()}
    skip = set(AXES) if wrong else set()  # which keys these have is not known then
    return faults + wrong + _walk({k: v for k, v in content.items() if k not in skip}, Config, schema_of, "", str(path))


def _defaults(entries: Any, config_dir: str | None, path: str) -> tuple[dict[str, str], list[str]]:
    """The groups that an experiment overrides -> their options, and what is wrong with them."""
    found: dict[str, str] = {}
    faults: list[str] = []
    for entry in entries if isinstance(entries, list) else []:
        for key, option in entry.items() if isinstance(entry, dict) else []:
            group = str(key).replace("override", "").strip("/ ")
            if group not in GROUPS:
                faults.append(f"{path}: defaults: there is no group {group}. {nearest(group, list(GROUPS))}")
            elif option not in options(group, config_dir):
                faults.append(
                    f"{path}: defaults: {group}={option}: there is no such {group}. "
                    f"{nearest(str(option), options(group, config_dir))}"
                )
            else:
                found[group] = option
    return found, faults


def _walk(content: Any, schema: type, schema_of: dict[str, type | None], prefix: str, path: str) -> list[str]:
    if not isinstance(content, dict):
        return [f"{path}: {prefix.rstrip('.')} is not a mapping. Write keys and values"]
    hints, faults = key_types(schema), []
    for name, value in content.items():
        hint = schema_of.get(f"{prefix}{name}") or hints.get(name)
        if value == "???":
            faults.append(f"{path}: {prefix}{name}=???: a value is missing. Write one")
        elif hint is None:
            faults.append(
                f"{path}: {prefix}{name}: there is no such key. {nearest(f'{prefix}{name}', [prefix + h for h in hints])}"
            )
        elif dataclasses.is_dataclass(hint):
            faults += _walk(value, hint, {}, f"{prefix}{name}.", path)  # type: ignore[arg-type]
        else:
            probe = OmegaConf.structured(schema)
            try:
                OmegaConf.update(probe, name, value)
            except OmegaConfBaseException as error:
                faults.append(f"{path}: {prefix}{name}={value}: {conversion(error, probe, name)}")
    return faults
