"""The options of `objective` and `method`: those of the package, which have a YAML in `conf/`, and those of users' own files.

A user's option is one Python file, named on the command line by `plugins=[FILE]`. It holds a subclass of `ObjectiveConfig` or
`MethodConfig`, which needs no YAML. Only the command line can name one: a YAML, or the configuration of a run that is read,
would run whoever's code wrote it.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import tritune.conf
import yaml
from omegaconf import OmegaConf
from tritune.trainer.config.axes import Head, Learns, MethodConfig, ObjectiveConfig
from tritune.trainer.errors import InputError, reason

AXES: dict[str, tuple[str, type[Any]]] = {
    "method": ("tritune.trainer.methods", MethodConfig),
    "objective": ("tritune.trainer.objectives", ObjectiveConfig),
}
_CONF = Path(tritune.conf.__file__).parent
_PLUGINS: dict[str, dict[str, type[Any]]] = {axis: {} for axis in AXES}
_CODE: dict[type, str] = {}  # of plugins' classes, a hash of their files
_LOADED: list[Path] = []


def axis_options(axis: str) -> dict[str, type[Any]]:
    """Name -> dataclass of every option of `method` or `objective`."""
    return built_in(axis) | _PLUGINS[axis]


def plugin_options(axis: str) -> dict[str, type[Any]]:
    """Name -> dataclass of the options in users' files."""
    return dict(_PLUGINS[axis])


@cache
def built_in(axis: str) -> dict[str, type[Any]]:
    """The options of the package: a YAML in `conf/` and the module of that name."""
    package, base = AXES[axis]
    names = sorted(path.stem for path in (_CONF / axis).glob("*.yaml"))
    return {name: _classes(importlib.import_module(f"{package}.{name}"), base)[0] for name in names}


@cache
def _defaults() -> dict[str, str]:
    entries = yaml.safe_load((_CONF / "config.yaml").read_text())["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def default_option(axis: str) -> Any:
    """The option that `conf/config.yaml` chooses, with its defaults."""
    return built_in(axis)[_defaults()[axis]]()


def option_where(axis: str, holds: Callable[[Any], bool]) -> Any:
    """The first option of the package, with its defaults, of which `holds` is true."""
    return next(option for option in (kind() for kind in built_in(axis).values()) if holds(option))


def reading_text() -> ObjectiveConfig:
    """The objective that learns plain text: by it the retention text is read and scored, whatever the run learns."""
    return option_where("objective", lambda o: o.learns is Learns.text)


def with_class_head() -> ObjectiveConfig:
    """The objective of a model with a head for classes."""
    return option_where("objective", lambda o: o.head is Head.classes)


def saying_labels() -> ObjectiveConfig:
    """The objective of a language model that says a label."""
    return option_where("objective", lambda o: o.label_prompt is not None)


def code_of(option: Any) -> list[str]:
    """What decides the documents that a user's option makes: a hash of its file as it was read, and its keys.

    Nothing of an option of the package, whose code changes with the version alone.
    """
    code = _CODE.get(type(option))
    return [] if code is None else [code, *(f"{f.name}={getattr(option, f.name)!r}" for f in fields(option))]


def load_plugins(files: list[str]) -> None:
    """Read users' files and add the options in them.

    Raises:
        InputError: a file is not there, does not import, holds no option, or one whose name is taken.
    """
    for name in files:
        path = Path(name).resolve()
        if path not in _LOADED:
            code = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for axis, kind in _found(path):
                _PLUGINS[axis][kind().name], _CODE[kind] = kind, code
            _LOADED.append(path)


def _found(path: Path) -> list[tuple[str, type[Any]]]:
    """The options in a file, each with its axis."""
    value = f"plugins={path}"
    if path.suffix != ".py" or not path.is_file():
        rule = "it is no Python file" if path.exists() else "the file does not exist"
        raise InputError(value, rule, "Give the file of an objective or a method of yours")
    if not path.stem.isidentifier():
        raise InputError(value, "a module has no such name", "Name the file with letters, digits and _ alone")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, and not a finder of its own: worker processes take this list over
    try:
        module = importlib.import_module(path.stem)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a user's file raises
        raise InputError(value, f"it does not import: {reason(error)}", "Mend the file") from None
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        rule = f"another module is called {path.stem}: {module.__file__ or 'one that is built in'}"
        raise InputError(value, rule, "Give the file another name")
    try:
        found = [(axis, kind) for axis, (_, base) in AXES.items() for kind in _classes(module, base) if kind().name]
        for _, kind in found:
            OmegaConf.structured(kind)
    except Exception as error:  # noqa: BLE001  a field without a default, or of a type that no key can have
        raise InputError(
            value, f"its keys cannot be read: {reason(error)}", "Give each a plain type and a default"
        ) from None
    if not found:
        rule = "it holds no dataclass with a name that is a subclass of ObjectiveConfig or MethodConfig"
        raise InputError(value, rule, "Write one; trainer/README.md has an example")
    for axis, kind in found:
        if kind().name in axis_options(axis):
            raise InputError(value, f"there is an option {axis}={kind().name} already", "Give it another name")
    return found


def _classes(module: ModuleType, base: type) -> list[type[Any]]:
    """The dataclasses that a module defines itself as subclasses of `base`."""
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, base)]
    return [k for k in kinds if k.__module__ == module.__name__ and "__dataclass_fields__" in vars(k)]
