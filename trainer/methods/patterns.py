"""Names of layers, modules and parameters as a user gives them: a name's end, or a glob."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, whole parts at its end (`mlp.up_proj`), or a glob of all of it."""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def holds(name: str, pattern: str) -> bool:
    """Whether `pattern` matches a parameter's name or that of a module around it."""
    parts = name.split(".")
    return any(matches(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def kinds(names: Iterable[str]) -> str:
    """The last parts of the names, each once, for a message."""
    return ", ".join(sorted({n.rpartition(".")[2] for n in names}))
