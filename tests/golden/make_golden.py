"""Write `golden.json`, the record that `test_golden.py` compares with: `python tests/golden/make_golden.py`.

Only for a change that is meant to move curves; a change of the house's order must leave the record as it is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("golden.json")

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import inputs, runs  # noqa: E402


def make(root: Path, backends: tuple[str, ...] = ("single", "fsdp", "zero3")) -> dict[str, Any]:
    """Write the inputs, train the runs on these backends, and return the record of them."""
    found: dict[str, Any] = {"inputs": f"{inputs.write_inputs(root / 'inputs'):08x}", "runs": {}}
    chosen = [run for run in runs.RUNS if run.backend in backends]
    figures = runs.train(chosen, root / "inputs", root)
    for run in chosen:
        resumed = None if run.resumed is None else list(run.resumed)
        head = {"overrides": run.overrides(), "ranks": run.ranks, "dtype": run.dtype, "resumed": resumed}
        found["runs"][run.name] = {**head, **figures[run.name]}
    return found


def write(record: dict[str, Any], path: Path) -> None:
    """One line for each figure of a run, so that a change of the record can be read."""
    parts = []
    for name, run in record["runs"].items():
        lines = [f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in run.items()]
        parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text(f'{{\n "inputs": "{record["inputs"]}",\n "runs": {{\n' + ",\n".join(parts) + "\n }\n}\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        write(make(Path(where)), Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD)
