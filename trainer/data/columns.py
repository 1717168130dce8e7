"""Which columns of a file are read, and as what: as the config maps them, else by the names that the field has for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tritune.trainer.config.choices import Kind
from tritune.trainer.config.data import COLUMNS, DataConfig, columns_key
from tritune.trainer.errors import some_names

NEEDS = {
    Kind.messages: ("messages",),
    Kind.prompt_response: ("prompt", "response"),
    Kind.text: ("text",),
    Kind.text_label: ("text", "label"),
}
READS = {
    Kind.messages: ("messages", "tools", "system"),
    Kind.prompt_response: ("prompt", "response", "input", "system", "history", "tools"),
    Kind.text: ("text",),
    Kind.text_label: ("text", "label"),
}
# Names under which common data sets have these columns, the likeliest first; a mapping in data.columns comes before.
ALIASES = {
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "contents"),
    "tools": ("tools", "functions"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "prompt": ("prompt", "instruction", "question", "query", "problem", "inputs", "input", "context"),
    "input": ("input", "context"),
    "response": ("response", "output", "completion", "answer", "solution", "targets"),
    "text": ("text",),
    "label": ("label", "category"),
}
# Columns that say whether a row is trained, or how much.
FLAGS = ("weight", "train", "loss", "loss_weight", "loss_scale")
JOINS = "+"  # between the names of columns whose texts are joined by a line end


@dataclass(frozen=True)
class Layout:
    """How the rows with the same columns are read.

    Attributes:
        columns: our name -> the file's, or several of these joined by `JOINS`.
        unread: columns that nothing reads.
        flags: columns that say whether a row is trained.
        verdicts: columns that may say that the row's answer is a bad one.
        others: columns that could have been our name as well, by our name.
    """

    columns: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def named_columns(config: DataConfig, key: str = "data.train") -> dict[str, str]:
    """Config key -> the column of the file that it names, of the source with that key."""
    prefix = columns_key(config, key)
    named = {f"{prefix}.{ours}": theirs for ours, theirs in config.columns.items()}
    return named | ({"data.group": config.group} if config.group else {})


def parts_of(theirs: str, names: Collection[str]) -> tuple[str, ...]:
    """The columns that a mapping names, of those that a row has; () where one is missing."""
    parts = (theirs,) if theirs in names else tuple(part.strip() for part in theirs.split(JOINS))
    return parts if all(part in names for part in parts) else ()


def columns_of(names: Collection[str], config: DataConfig) -> dict[str, str]:
    """Our name -> the file's, for the columns that a row has."""
    found: dict[str, str] = {}
    for ours in COLUMNS:
        if ours in config.columns:
            if parts_of(config.columns[ours], names):
                found[ours] = config.columns[ours]
        elif candidates := candidates_of(ours, names, config):
            found[ours] = candidates[0]
    if found.get("input") == found.get("prompt"):  # rows of an input and an output alone
        found.pop("input", None)
        rest = [name for name in candidates_of("input", names, config) if name != found.get("prompt")]
        if rest and "prompt" in found:
            found["input"] = rest[0]
    return found


def candidates_of(ours: str, names: Collection[str], config: DataConfig) -> list[str]:
    """The columns that have one of the names of ours, as they stand or by case alone, and that no mapping has taken."""
    taken = {part for theirs in config.columns.values() for part in parts_of(theirs, names)} | set(config.ignore)
    exact = [name for name in ALIASES[ours] if name in names and name not in taken]
    if exact:
        return exact
    folded = {name.strip().casefold(): name for name in names if name not in taken}
    return [folded[name] for name in ALIASES[ours] if name in folded]


def layout_of(
    names: Collection[str], columns: dict[str, str], kind: Kind, config: DataConfig, verdicts: tuple[str, ...] = ()
) -> Layout:
    """What becomes of each column of rows of a kind."""
    mine = {ours: theirs for ours, theirs in columns.items() if ours in READS[kind]}
    used = {part for theirs in mine.values() for part in parts_of(theirs, names)} | {config.group}
    free = [name for name in names if name not in used and name not in config.ignore]
    flags = tuple(name for name in free if name in FLAGS)
    unread = tuple(name for name in free if name not in flags)
    others = {
        ours: rest
        for ours in mine
        if ours not in config.columns
        and (rest := tuple(n for n in candidates_of(ours, names, config) if n not in used))
    }
    return Layout(mine, unread, flags, verdicts, others)


def missing_of(kinds: Iterable[Kind], columns: Mapping[str, str]) -> tuple[str, ...]:
    """What the kind lacks that a row comes nearest to."""
    lacking = [tuple(name for name in NEEDS[kind] if name not in columns) for kind in kinds]
    begun = [names for kind, names in zip(kinds, lacking, strict=True) if len(names) < len(NEEDS[kind])]
    return min(begun or lacking[-1:], key=len)


def how_to_map(missing: Iterable[str], fields: Mapping[str, Any], columns: Mapping[str, str], prefix: str) -> str:
    """The overrides that map what is missing to what a row has, as far as its values say."""
    used = {part for theirs in columns.values() for part in parts_of(theirs, fields.keys())}
    free = [name for name in fields if name not in used]
    hints, names = [], list(missing)
    for ours in names:
        fitting = [n for n in free if _fits(fields[n], ours)]
        one = fitting[0] if len(fitting) == 1 and len(names) == 1 else f"<one of {some_names(fitting or free)}>"
        if ours == "text" and len(fitting) == 2:  # pairs of texts; one of them can be chosen as well
            one = JOINS.join(fitting)
        hints.append(f"{prefix}.{ours}={one}" if free else f"{prefix}.{ours}=<name in the file>")
        free = [name for name in free if name != one]
    return f"Map {'it' if len(hints) == 1 else 'them'}: {' '.join(hints)}"


def _fits(value: Any, ours: str) -> bool:
    if ours in ("messages", "tools", "history"):
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith(("[", "{")))
    return isinstance(value, str) or (ours == "label" and isinstance(value, int) and not isinstance(value, bool))
