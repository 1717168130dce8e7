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
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import tritune.conf
import yaml
from tritune.trainer.config.axes import Head, Learns, MethodConfig, ObjectiveConfig
from tritune.trainer.errors import InputError, reason

AXES: dict[str, tuple[str, type[Any]]] = {
    "method": ("tritune.trainer.methods", MethodConfig),
    "objective": ("tritune.trainer.objectives", ObjectiveConfig),
}
_CONF = Path(tritune.conf.__file__).parent
_PLUGINS: dict[str, dict[str, type[Any]]] = {axis: {} for axis in AXES}
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
    """A hash of the file of a user's option, whose code may change under the same name; nothing of one of the package."""
    if type(option) not in {kind for kinds in _PLUGINS.values() for kind in kinds.values()}:
        return []
    path = Path(sys.modules[type(option).__module__].__file__ or "")
    return [hashlib.sha256(path.read_bytes()).hexdigest()]


def load_plugins(files: list[str]) -> None:
    """Read users' files and add the options in them.

    Raises:
        InputError: a file is not there, does not import, holds no option, or one whose name is taken.
    """
    for name in files:
        path = Path(name).resolve()
        if path not in _LOADED:
            for axis, kind in _found(path):
                _PLUGINS[axis][kind().name] = kind
            _LOADED.append(path)


def _found(path: Path) -> list[tuple[str, type[Any]]]:
    """The options in a file, each with its axis."""
    value = f"plugins={path}"
    if path.suffix != ".py" or not path.is_file():
        raise InputError(value, "it is no Python file", "Give the file of an objective or a method of yours")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, and not a finder of its own: worker processes take this list over
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # noqa: BLE001  whatever a user's file raises
        raise InputError(value, f"it does not import: {reason(error)}", "Mend the file") from None
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        rule = f"another module is called {path.stem}: {module.__file__ or 'one that is built in'}"
        raise InputError(value, rule, "Give the file another name")
    found = [(axis, kind) for axis, (_, base) in AXES.items() for kind in _classes(module, base)]
    if not found:
        rule = "it holds no dataclass that is a subclass of ObjectiveConfig or MethodConfig"
        raise InputError(value, rule, "Write one; trainer/README.md has an example")
    for axis, kind in found:
        if kind().name in axis_options(axis):
            raise InputError(value, f"there is a {axis}={kind().name} already", "Give it another name")
    return found


def _classes(module: ModuleType, base: type) -> list[type[Any]]:
    """The subclasses of `base` that a module defines itself."""
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, base)]
    return [k for k in kinds if k.__module__ == module.__name__]
