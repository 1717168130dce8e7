"""What a row's text shows when it is looked at alone: whom it names, what it gives away, how it was spoilt, what it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tritune.trainer.audit.findings import PLACES, Finding, Severity, counted
from tritune.trainer.config.data import Check
from tritune.trainer.data.credentials import find_credentials
from tritune.trainer.data.kinds import Record, turns_of
from tritune.trainer.data.personal import Finding as Place
from tritune.trainer.data.personal import find_personal, masked
from tritune.trainer.data.spoilt import find_spoilt

SAYS = {
    Check.empty_answers: "with an empty answer",
    Check.empty_prompts: "with an empty prompt",
    Check.personal: "with what seems personal data: ",
    Check.credentials: "with what seems a key or a password: ",
    Check.mojibake: "with characters that were decoded wrongly",
}
SHOWN = 3  # of what one row holds


@dataclass
class Sightings:
    """Of one check: the rows, the kinds that were seen with their numbers, and (place, what is there, masked) of the first."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)

    def finding(self, check: Check) -> Finding:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        text = f"{counted(self.rows, 'row')} {SAYS[check]}{kinds}"
        places, notes = [place for place, _ in self.places], [note for _, note in self.places]
        return Finding(check, Severity.warning, self.rows, text, places, notes if any(notes) else [], dict(self.kinds))


def look(seen: dict[Check, Sightings], record: Record, personal: bool) -> None:
    """Add to `seen` what `record` shows.

    Args:
        personal: look for personal data, keys and passwords, too.
    """
    for check, kinds, note in _sightings(record, personal):
        of = seen.setdefault(check, Sightings())
        of.rows += 1
        of.kinds.update(kinds)
        if len(of.places) < PLACES:
            of.places.append((record.place, note))


def hide(text: str) -> str:
    """A text with what seems personal or secret in it masked."""
    for found in sorted([*find_personal(text), *find_credentials(text)], key=lambda f: -f.start):
        text = text[: found.start] + _shown(text, found) + text[found.stop :]
    return text


def _sightings(record: Record, personal: bool) -> Iterator[tuple[Check, list[str], str]]:
    whole = record.text
    if whole is None:
        turns = turns_of(record)
        whole = "\n".join(t.get("content") or "" for t in turns)
        if any(t["role"] == "assistant" and not _says(t) and not t.get("tool_calls") for t in turns):
            yield Check.empty_answers, [], ""
        if any(t["role"] == "user" and not _says(t) for t in turns):
            yield Check.empty_prompts, [], ""
    if personal:
        for check, found in (
            (Check.personal, find_personal(whole)),
            (Check.credentials, list(find_credentials(whole))),
        ):
            if found:
                shown = ", ".join(f"{f.kind} {_shown(whole, f)}" for f in found[:SHOWN])
                yield check, [f.kind for f in found], shown
    spoilt = find_spoilt(whole)
    if spoilt is not None:
        yield Check.mojibake, [], str(spoilt)


def _says(turn: dict) -> bool:
    return bool((turn.get("content") or "").strip())


def _shown(text: str, found: Place) -> str:
    return "***" if found.kind in ("key", "password") else masked(text, found)
