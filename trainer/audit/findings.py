"""What an audit says: one finding for each thing that is wrong, and which of them end a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tritune.trainer.config.data import Check
from tritune.trainer.errors import InputError

PLACES = 200  # how many rows a finding names; it counts all


class Severity(StrEnum):
    """`fault`: training would be refused, or train something else than was meant. `warning`: to be looked at. `note`: good
    to know, or what the config says should happen; it ends nothing."""

    fault = "fault"
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        count: rows, or what `text` says.
        text: one line, without content of rows.
        places: where, file:line, the first `PLACES`.
        notes: what there is to say of each place (why, or the other row), none or one a place. Personal data is masked.
        details: figures for machines.
    """

    name: Check
    severity: Severity
    count: int
    text: str
    places: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def shown(self, count: int) -> list[str]:
        """The first places with their notes, by file name."""
        names = [Path(place).name for place in self.places[:count]]
        notes = self.notes[:count] or [""] * count
        return [f"{name}: {note}" if note else name for name, note in zip(names, notes, strict=False)]


def counted(number: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def beside(place: str, other: str) -> str:
    """How a note at `place` names another place: by its line where it is in the same file."""
    path, _, line = other.rpartition(":")
    if path == place.rpartition(":")[0]:
        return f"line {line}" if line.isdigit() else line
    return Path(other).name


REMEDIES = {
    Check.unreadable: "Give other rows, or another share",
    Check.bad_rows: "Mend the rows, or data.bad_rows=skip leaves them out",
    Check.unsupervised: "Mend the rows, raise data.max_length, or data.unsupervised=drop",
    Check.empty_answers: "Mend or remove the rows",
    Check.empty_prompts: "Mend or remove the rows",
    Check.unrendered: "Give a model.chat_template that writes it, take it out of the rows, or data.unrendered=warn",
    Check.control_tokens: "Take them out of the rows, or data.special_tokens=keep trains them as the tokens that they are",
    Check.unspelt: "Take a model whose tokenizer has these characters, or write the rows without them",
    Check.turns_apart: "data.last_turn_only=true trains the last answer of each conversation alone",
    Check.over_context: "Lower data.max_length",
    Check.truncation: "Raise data.max_length, or data.overlong=drop",
    Check.truncated_answers: "Raise data.max_length, or data.overlong=cut_prompt_start|cut_prompt_middle|drop",
    Check.no_stop_token: "Use a chat template whose answers end with a stop token, or data.require_stop_token=false",
    Check.double_bos: "Take the BOS token out of the rows or of the chat template",
    Check.template_mismatch: "Give a model.chat_template whose generation prompt begins its answers",
    Check.duplicates_exact: "data.duplicates=drop",
    Check.duplicates_near: "data.duplicates=drop_near, or raise data.similarity",
    Check.leakage_exact: "Take the rows out of one of the splits",
    Check.leakage_near: "Take the rows out of one of the splits",
    Check.leakage_prompt: "Take the prompts out of one of the splits",
    Check.split_leaked: "Take the rows out of one of the splits, or cut one with data.test_share",
    Check.contradictions: "Settle which label is right",
    Check.same_prompt: "Settle which answer is wanted",
    Check.unknown_labels: "Mend the rows, or give data.labels",
    Check.label_balance: "Collect more of the rare labels, and judge by macro F1",
    Check.personal: "Remove the personal data of people who did not agree to its being learnt",
    Check.unread: "Map the column in data.columns, or name it in data.ignore",
    Check.similar_labels: "Spell each label in one way",
    Check.credentials: "Remove them, and change those that are in use",
    Check.mojibake: "Decode the source anew: it was UTF-8 that something read as another encoding",
}


def blocking(findings: Sequence[Finding], fail_on: Sequence[str]) -> InputError | None:
    """The error that ends a run with these findings, if any of `fail_on` is more than a note among them."""
    found = [f for f in findings if f.name in fail_on and f.severity is not Severity.note]
    if not found:
        return None
    names = list(dict.fromkeys(f.name.value for f in found))
    rule = "; ".join(f.text + (f" ({', '.join(f.shown(1))})" if f.places else "") for f in found)
    remedies = "; ".join(dict.fromkeys(REMEDIES[f.name] for f in found))
    return InputError(f"audit: {', '.join(names)}", rule, f"{remedies}. Or leave the name out of audit.fail_on")
