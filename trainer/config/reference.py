"""Every key and every option as Markdown, read off the dataclasses and the comments beside their fields.

    python -m tritune.trainer.config.reference conf/README.md

writes them between the two marks of that file; a test keeps the committed file equal to what this gives.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator
from enum import Enum
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import tritune.conf
from tritune.trainer.config.data import Check
from tritune.trainer.config.registry import AXES, built_in, default_option
from tritune.trainer.config.schema import IDENTITY, Config, names, schemas

MARKS = ("<!-- keys: python -m tritune.trainer.config.reference conf/README.md -->", "<!-- /keys -->")


def main(path: Path) -> None:
    """Write the reference between the marks of `path`."""
    before, rest = path.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n\n{reference()}\n{MARKS[1]}{after}")


def reference() -> str:
    """The options of each group, then the keys of each, then what an audit can find."""
    parts = ["## Options", *_table(("option", "is"), _options())]
    parts += ["## Keys", *_table(("key", "takes", "default", "means"), _scalars())]
    for field in dataclasses.fields(Config):
        schema = get_type_hints(Config)[field.name]
        if isinstance(schema, type) and dataclasses.is_dataclass(schema):
            parts += _group(field.name, schema)
    parts += ["### What `audit.fail_on` may name", *_table(("finding", "is"), _members(Check))]
    identity = ", ".join(f"`{key}`" for key in IDENTITY)
    parts += ["### What a run is", "", f"A run goes on only with the same values of {identity}. Its base and its rows are "
              "compared by their content, wherever these lie.", ""]  # fmt: skip
    return "\n".join(parts)


def comments(kind: type) -> dict[str, str]:
    """Name -> the comments on the lines of each field of a dataclass, or of each member of an enumeration.

    Args:
        kind: its own fields alone are read, not those that it inherits.
    """
    source = inspect.getsource(kind)
    found: dict[str, list[str]] = {}
    name, depth, begins = "", 0, True  # the statement's first word; blocks around; whether a statement begins
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.setdefault(name, []).append(token.string.removeprefix("#").strip())
        elif token.type == tokenize.NAME and begins and depth == 1:
            name = token.string
        depth += {tokenize.INDENT: 1, tokenize.DEDENT: -1}.get(token.type, 0)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return {name: " ".join(lines) for name, lines in found.items()}


def keys(kind: type) -> Iterator[tuple[str, Any, Any, str]]:
    """Name, type, default and meaning of the fields that a dataclass declares itself."""
    hints, said = get_type_hints(kind), comments(kind)
    for field in dataclasses.fields(kind):
        if field.name in kind.__annotations__:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            yield field.name, hints[field.name], default, _meaning(said.get(field.name, ""), hints[field.name])


def _meaning(comment: str, hint: Any) -> str:
    """The comment, and what the words say that the key takes."""
    listed = isinstance(hint, type) and issubclass(hint, Enum) and hint.__doc__
    words = " ".join((hint.__doc__ or "").split()) if listed else ""
    return f"{comment}. {words}" if comment and words else comment or words


def _scalars() -> Iterator[tuple[str, ...]]:
    return (_row(name, *rest) for name, *rest in keys(Config) if not dataclasses.is_dataclass(rest[0]))


def _group(group: str, schema: type) -> list[str]:
    """The keys of a group, then those that some of its options have beside them, or with another default."""
    parts = _section(f"`{group}`", group, schema)
    by_schema: dict[type, list[str]] = {}
    for option, own in schemas().get(group, {}).items():
        if own is not schema:
            by_schema.setdefault(own, []).append(f"`{group}={option}`")
    for own, options in by_schema.items():
        if any(name != "name" for name, *_ in keys(own)):
            parts += _section(", ".join(options), group, own)
    for name, hint in get_type_hints(schema).items():
        for inner in get_args(hint):
            if dataclasses.is_dataclass(inner):
                parts += _section(f"`{group}.{name}.<name>`", f"{group}.{name}.<name>", inner)
    return parts


def _section(title: str, prefix: str, kind: Any) -> list[str]:
    generated = kind.__doc__.startswith(f"{kind.__name__}(")  # a dataclass without a docstring is given its signature
    said = [] if generated else [" ".join(kind.__doc__.split()), ""]
    named = kind.__base__ is not object  # the option's name stands with the group's own keys
    rows = [_row(f"{prefix}.{name}", *rest) for name, *rest in keys(kind) if not (named and name == "name")]
    return [f"### {title}", "", *said, *_table(("key", "takes", "default", "means"), rows)[1:]]


def _row(key: str, hint: Any, default: Any, meaning: str) -> tuple[str, ...]:
    group, _, name = key.partition(".")
    takes = " ".join(f"`{n}`" for n in names()[group]) if name == "name" and group in names() else _takes(hint)
    if key == "evaluation.metric":
        metrics = dict.fromkeys(m for objective in built_in("objective").values() for m in objective.metrics)
        takes = " ".join(f"`{metric}`" for metric in metrics)
    if name == "name" and group in AXES:
        default = default_option(group).name
    return f"`{key}`", takes, f"`{shown_value(default)}`", meaning


def _takes(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_takes(part) for part in sorted(get_args(hint), key=lambda part: part is NoneType))
    if hint is NoneType:
        return "`null`"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " ".join(f"`{member.value}`" for member in hint)
    inner = [_takes(part) for part in get_args(hint)]
    match get_origin(hint):
        case None:
            words = {str: "text", int: "integer", float: "number", bool: "`true` `false`", Any: "anything"}
            return words.get(hint, "keys")
        case kind if kind is list:
            return f"list of {inner[0]}"
        case _:
            return f"mapping of {inner[0]} to {inner[1]}"


def shown_value(value: Any) -> str:
    """A default as an override writes it."""
    match value:
        case None | bool():
            return "null" if value is None else str(value).lower()
        case Enum():
            return str(value.value)
        case list():
            return f"[{','.join(shown_value(v) for v in value)}]"
        case str():
            return value.replace("\n", "\\n")
        case _:
            return str(value)


def _members(kind: type[Enum]) -> Iterator[tuple[str, str]]:
    said = comments(kind)
    return ((f"`{member.value}`", said[member.name]) for member in kind)


def _options() -> Iterator[tuple[str, str]]:
    """Each file of a group in `conf/` with the comment at its head."""
    for path in sorted(Path(tritune.conf.__file__).parent.glob("*/*.yaml")):
        head = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        said = " ".join(line.removeprefix("#").strip() for line in head if not line.startswith("# @package"))
        yield f"`{path.parent.name}={path.stem}`", said


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
