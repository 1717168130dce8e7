"""What the reading of the rows left: columns and message keys that nothing reads, labels that are spelled in several ways."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np
from tritune.trainer.audit.findings import Finding, Severity
from tritune.trainer.config.data import Check
from tritune.trainer.data.examples import DataReport
from tritune.trainer.data.splits import Splits
from tritune.trainer.data.unread import listed


def unread(name: str, report: DataReport) -> Iterator[Finding]:
    """What the rows of a split hold and nothing reads: a warning where it is words, lists or objects, else a note.

    Numbers, dates and names of sources stand beside the rows of nearly every data set.
    """
    parts = [(Severity.warning, {n: c for n, c in report.unread.items() if n in report.unread_texts})]
    parts += [(Severity.note, {n: c for n, c in report.unread.items() if n not in report.unread_texts})]
    for severity, counts in parts:
        if counts:
            text = f"{name}: not read: {listed(counts)}"
            yield Finding(Check.unread, severity, max(counts.values()), text, details={"split": name, "unread": counts})


def similar_labels(splits: Splits) -> Iterator[Finding]:
    """Labels of the label set that are one but for case, white space or Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in splits.labels:
        groups.setdefault(folded(label), []).append(label)
    alike = [labels for labels in groups.values() if len(labels) > 1]
    if not alike:
        return
    train = splits.examples.get("train")
    known = np.zeros(0, np.int64) if train is None else train.labels[train.labels >= 0]
    counts = np.bincount(known, minlength=len(splits.labels))
    number = {label: i for i, label in enumerate(splits.labels)}
    said = "; ".join(" and ".join(f"{label!r} ({counts[number[label]]:,})" for label in labels) for labels in alike[:3])
    more = f" and {len(alike) - 3:,} more" if len(alike) > 3 else ""
    text = f"labels that differ by case, space or Unicode form alone are classes of their own: {said}{more}"
    details = {"labels": {label: int(counts[number[label]]) for labels in alike for label in labels}}
    rows = int(sum(details["labels"].values()))
    yield Finding(Check.similar_labels, Severity.warning, rows, text, details=details)


def folded(label: str) -> str:
    """A label without what a reader does not see: Unicode's compatible forms, case, white space at its ends or repeated."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())
