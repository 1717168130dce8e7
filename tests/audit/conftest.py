"""Every audit of these tests has a cache of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for corpus.py


@dataclass
class Outcome:
    """What `tritune audit` printed, wrote and returned."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def report(self) -> dict:
        return json.loads((self.folder / "audit.json").read_text())

    def lines(self, name: str) -> dict[str, set[int]]:
        """File name -> lines at which `name` was found."""
        found: dict[str, set[int]] = {}
        for finding in self.report["findings"]:
            for place in finding["places"] if finding["name"] == name else []:
                path, _, line = place.rpartition(":")
                found.setdefault(Path(path).name, set()).add(int(line))
        return found

    def names(self) -> set[str]:
        return {finding["name"] for finding in self.report["findings"]}

    def severity(self, name: str) -> set[str]:
        return {f["severity"] for f in self.report["findings"] if f["name"] == name}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def audit(tmp_path, capsys) -> Callable[..., Outcome]:
    from tritune.launch.cli import main

    def call(*overrides: str) -> Outcome:
        capsys.readouterr()
        folder = tmp_path / "audit"
        code = main(["audit", f"audit.out={folder}", "cache.num_procs=1", *overrides])
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err, folder)

    return call
