"""A record beside what is found: what has to be equal, and by how much numbers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def differences(found: Any, recorded: Any, bound: float) -> list[str]:
    """A line for each figure that differs: texts and whole numbers at all, other numbers by more than `bound`, relative."""
    lines = []
    theirs = dict(_leaves(recorded))
    ours = dict(_leaves(found))
    for path in [*theirs, *(path for path in ours if path not in theirs)]:
        a, b = ours.get(path, "absent"), theirs.get(path, "absent")
        apart = relative(a, b)
        if not apart <= bound:
            lines.append(f"{path}: {a}, recorded {b}" + (f", {apart:.1e} of it" if math.isfinite(apart) else ""))
    return lines


def largest(found: Any, recorded: Any) -> tuple[float, str]:
    """The largest relative difference, infinite where something else than a number differs, and where it is."""
    ours = dict(_leaves(found))
    return max((relative(ours.get(path), value), path) for path, value in _leaves(recorded))


def relative(a: Any, b: Any) -> float:
    """Of two numbers with fractions |a - b| / |b|; else 0 where they are equal and infinity where not."""
    if a == b and type(a) is type(b):
        return 0.0
    if type(a) is float and type(b) is float and b != 0.0:
        return abs(a - b) / abs(b)
    return math.inf


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list):
        yield f"{path}.length", len(tree)
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{number}]")
    else:
        yield path, tree
