"""What a run directory says of its run, read for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact_tree
from tritune.trainer.yaml_file import read_mapping


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
        config=redact_tree(read_mapping(directory / "config.yaml")),
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
    return redact_tree(json.loads(path.read_text())) if path.is_file() else absent


def _rows(path: Path) -> list[dict[str, Any]]:
    """The log's rows; one that a kill cut short is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
