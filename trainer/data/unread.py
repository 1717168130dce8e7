"""What rows hold and nothing reads: columns, and keys of messages that change nothing of what the template writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError

MOST = 200  # names that are counted apart: a file may have thousands
SHOWN = 8  # that a message lists
_REST = "others"
_ALWAYS = {"role", "content", UNTRAINED}
_TRIES = 3  # conversations in which a key changes nothing, before it counts as one that is not read


@dataclass
class Unread:
    """Counts by name, `column id` or `message key name`.

    Attributes:
        rows: how many rows, or messages, hold something under it.
        texts: how many of them hold words, lists or objects, and not just a number or a name.
    """

    rows: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)

    def add(self, fields: Mapping[str, Any], names: Iterable[str], what: str = "column") -> None:
        """Count what a row, or a message, has under names that nothing reads."""
        for name in names:
            value = fields[name]
            if value is None or value == "" or value == [] or value == {}:
                continue
            called = f"{what} {name}"
            if called not in self.rows and len(self.rows) >= MOST:
                called = f"{what} {_REST}"
            self.rows[called] += 1
            if isinstance(value, list | dict) or (isinstance(value, str) and " " in value.strip()):
                self.texts[called] += 1

    def take(self, other: Unread) -> None:
        """Add the counts of another."""
        self.rows.update(other.rows)
        self.texts.update(other.texts)


def listed(counts: Mapping[str, int]) -> str:
    """Names with their counts, the commonest first: all where they are few."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [
        f"{what} in {count:,} {'message' if what.startswith('message key') else 'row'}{'' if count == 1 else 's'}"
        for what, count in ordered[:SHOWN]
    ]
    return ", ".join(parts) + (f" and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else "")


class Asks(Protocol):
    """What a chat template can do that is needed here."""

    def prompt(self, messages: list[dict], place: str, tools: list | None = None) -> str: ...


class HasTurns(Protocol):
    """What is needed of a record."""

    @property
    def messages(self) -> list[dict[str, Any]] | None: ...
    @property
    def tools(self) -> list[Any] | None: ...
    @property
    def place(self) -> str: ...


class KeyReader:
    """Finds out which keys of messages a template reads: it writes something else without them.

    By role, since templates treat these differently. One conversation in which a key matters settles it for good, a few in
    which it does not as well.
    """

    def __init__(self, template: Asks) -> None:
        self._template = template
        self._read: dict[tuple[str, str], bool] = {}
        self._tries: Counter[tuple[str, str]] = Counter()

    def count(self, records: Sequence[HasTurns], unread: Unread) -> None:
        """Count the keys of messages that nothing reads."""
        for record in records:
            for message in record.messages or ():
                if len(message) > 2:
                    names = [name for name in message if name not in _ALWAYS and not self._reads(name, message, record)]
                    unread.add(message, names, "message key")

    def _reads(self, name: str, message: dict[str, Any], record: HasTurns) -> bool:
        key = (message["role"], name)
        if key not in self._read:
            if self._matters(key, record):
                self._read[key] = True
            else:
                self._tries[key] += 1
                if self._tries[key] < _TRIES:
                    return False
                self._read[key] = False
        return self._read[key]

    def _matters(self, key: tuple[str, str], record: HasTurns) -> bool:
        role, name = key
        messages = record.messages or []
        without = [
            {k: v for k, v in m.items() if k != name} if m["role"] == role and name in m else m for m in messages
        ]
        said = list(self._said([messages, without], record))
        return said[0] != said[1]

    def _said(self, conversations: list[list[dict]], record: HasTurns) -> Iterator[str | None]:
        for messages in conversations:
            try:
                yield self._template.prompt(messages, record.place, record.tools)
            except InputError:
                yield None
