"""What a run directory says of its run, read for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact_tree
from tritune.trainer.run.files import read_config, read_json, read_rows


@dataclass(frozen=True)
class Record:
    """The files of a run directory, secrets blotted out; what is missing is empty.

    Attributes:
        steps: rows of `metrics.jsonl`; evaluations: of `evaluations.jsonl`.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    audit: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def eval(self) -> dict[str, dict[str, dict[str, float] | None]]:
        """Split -> base, tuned -> figure -> value."""
        return self.summary.get("eval", {})


def read_record(directory: Path) -> Record:
    """Read a run.

    Raises:
        InputError: there is no run.
    """
    if not (directory / "config.yaml").is_file():
        raise InputError(f"run.dir={directory}", "it holds no run", "Give the directory of a run that has started")
    return Record(
        name=directory.resolve().name,
        config=redact_tree(read_config(directory)),
        environment=_json(directory, "environment.json", {}),
        data=_json(directory, "data.json", {}),
        audit=_json(directory / "audit", "audit.json", {}),
        status=_json(directory, "status.json", {}),
        summary=_json(directory, "summary.json", {}),
        samples=_json(directory, "samples.json", []),
        steps=_rows(directory / "metrics.jsonl"),
        evaluations=_rows(directory / "evaluations.jsonl"),
    )


def _json(directory: Path, name: str, absent: Any) -> Any:
    path = directory / name
    found = read_json(path, type(absent), "Move it away: the report is written without it")
    return absent if found is None else redact_tree(found)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The log's rows; one that a kill cut short is left out.

    Raises:
        InputError: lines before are none.
    """
    rows, spoilt = read_rows(path)
    if spoilt:
        rule = f"{spoilt:,} of its lines are no rows"
        raise InputError(str(path), rule, "Start the run again, which leaves them out, or remove them by hand")
    return rows
