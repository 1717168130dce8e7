"""Read a YAML file that anyone may have written: what it says, or one message, in about a second.

Read as Hydra reads it, for which a date is text and a key that stands twice is a fault. An alias may stand for an alias and
so on: what a file says is counted before it is laid out. Nothing in it is ever instantiated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded

MOST_BYTES = 1 << 20
MOST_NODES = 100_000  # values, with those that an alias repeats
MOST_DEPTH = 40  # mappings and lists in one another; a model's own config has three
MOST_DIGITS = 100  # of an integer; no key takes one of more than twenty


def read_yaml(path: Path) -> tuple[str, Any]:
    """Return the text of a file and what it says; for an empty one None.

    Raises:
        InputError: it is no file that can be read, no YAML, or says more than a configuration can.
    """
    text = _read_text(path)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return text, None
            _require_few(node, path)
            return text, loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise _fault(path, f"it nests deeper than {MOST_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise _fault(path, f"it is not valid YAML ({bounded(' '.join(str(error).split()))})") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """As `read_yaml`, of a file that must hold keys and values.

    Raises:
        InputError: also where it holds something else.
    """
    content = read_yaml(path)[1]
    if not isinstance(content, dict):
        raise _fault(path, f"it is a {type(content).__name__}, and must be a mapping of keys to values")
    for key in content:
        if not isinstance(key, str):
            raise _fault(path, f"its key {bounded(str(key))} is no text")
    return content


def _read_text(path: Path) -> str:
    if not path.is_file():  # a pipe or a device would be read without an end
        raise InputError(str(path), "it is no regular file", "Give a YAML file")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise _fault(path, f"it has {size:,} bytes, and a configuration has at most {MOST_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _fault(path, f"it is not valid YAML ({error})") from None
    except OSError as error:
        raise InputError(str(path), f"it cannot be read ({error.strerror})", "Check its permissions") from None


def _require_few(root: yaml.Node, path: Path) -> None:
    """Refuse a document that, with its aliases laid out, has too many values or never ends."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            raise _fault(path, f"line {node.start_mark.line + 1} holds an alias of what it stands in, without an end")
        if id(node) not in sizes:
            inside.add(id(node))
            value = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
            children = [n for pair in value for n in pair] if isinstance(node, yaml.MappingNode) else value
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            inside.remove(id(node))
        return sizes[id(node)]

    if (count := size(root)) > MOST_NODES:
        number = f"{count:,}" if count < 10**9 else "over a billion"
        raise _fault(path, f"with its aliases laid out it has {number} values, and at most {MOST_NODES:,} are read")


def _fault(path: Path, rule: str) -> InputError:
    return InputError(str(path), rule, "Mend the file")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once, a date is text, and numbers and depth have a bound."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        try:
            if self._depth > MOST_DEPTH:
                problem = f"it nests deeper than {MOST_DEPTH} levels"
                raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {bounded(key.value)} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)

    def bounded_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            problem = f"an integer of {len(node.value):,} digits, and at most {MOST_DIGITS} are read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.bounded_int)
