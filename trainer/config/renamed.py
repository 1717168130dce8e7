"""Keys with a new name: the old one goes on working for one version, with a line that names the new one.

An old key stays in its dataclass, with `old_name()` for its value, so that a user's YAML may hold it. Nothing else reads it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import Field, field, replace
from functools import cache
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

RENAMED = {"optim.max_norm": "optim.max_grad_norm"}  # old -> new, each within one group


def old_name() -> Any:
    """The value of an old key in its dataclass."""
    return field(default=None, metadata={"old": True})


def is_old(key: Field) -> bool:
    return "old" in key.metadata


def renamed_override(override: Override) -> Override:
    """The override under the key's name of today."""
    old, line = override.key_or_group, override.input_line or ""
    if old not in RENAMED:
        return override
    _say(old)
    return replace(override, key_or_group=RENAMED[old], input_line=RENAMED[old] + line.removeprefix(old))


def settle_old_names(composed: Any) -> None:
    """Put what YAML files give under old names under the new ones; references stay, since each is a fault of its own."""
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        node = OmegaConf.select(composed, group)
        if OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name) or node[name] is None:
            continue
        _say(old)
        if OmegaConf.select(composed, new) == _default(new):  # what is given under the new name goes before
            OmegaConf.update(composed, new, node[name])
        OmegaConf.update(composed, old, None)


def _default(key: str) -> Any:
    from tritune.trainer.config.schema import Config  # which imports this module

    group, _, name = key.partition(".")
    return getattr(getattr(Config(), group), name)


def renamed_keys(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, as a run of an older version wrote it, under the names of today."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def renamed_tree(kept: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a run of an older version wrote, under the names of today."""
    found = dict(kept)
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if isinstance(found.get(group), dict):
            found[group] = {new.partition(".")[2] if key == name else key: v for key, v in found[group].items()}
    return found


@cache
def _say(old: str) -> None:
    """Once a process, and of the ranks by the first alone."""
    if os.environ.get("RANK", "0") == "0":
        rule = f"{old} is called {RENAMED[old]} now, and is read as that. The next version no longer knows the old name"
        print(f"tritune: {rule}", file=sys.stderr)
