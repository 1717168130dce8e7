"""A classifier that may abstain: the threshold chosen on the validation split, and what it comes to on every split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tritune.trainer.backends import Backend
from tritune.trainer.data.examples import Examples
from tritune.trainer.evaluation.predictions import Recorder
from tritune.trainer.metrics.risk_coverage import answered_figures, curve, least_threshold
from tritune.trainer.run.files import read_json

Outcomes = tuple[np.ndarray, np.ndarray]


def outcomes(recorder: Recorder, examples: Examples, backend: Backend) -> Outcomes:
    """Confidence, float64 [n], and whether right, bool [n], of the split's rows with a label; the same on all ranks."""
    row_of = {number: row for row, number in enumerate(examples.numbers.tolist())}
    found = torch.zeros(2, len(examples), dtype=torch.float64)
    for number, values in recorder.kept.items():
        row, chances = row_of[number], values["probabilities"].double()
        best = int(chances.argmax())
        found[0, row], found[1, row] = chances[best], best == int(examples.labels[row])
    confidence, right = backend.sum(found.to(backend.device)).cpu().numpy()[:, examples.labels >= 0]
    return confidence, right > 0


def settle(found: Mapping[str, Outcomes], target: float | None) -> dict[str, Any]:
    """What `summary.json` says of abstention.

    Args:
        found: of each split that was scored.
        target: `evaluation.abstain`.

    Returns:
        `target`; `below`, the threshold, None where none was asked for or none reaches it; `splits`, the figures of each with
        it; `curves`, accuracy over coverage of each.
    """
    below = least_threshold(*found["validation"], target) if target is not None else None
    return {
        "target": target,
        "below": below,
        "splits": {name: answered_figures(*pair, below) for name, pair in found.items()} if below is not None else {},
        "curves": {name: curve(*pair) for name, pair in found.items() if len(pair[0])},
    }


def told(abstain: dict[str, Any]) -> str | None:
    """A line for the user; None where no accuracy was asked for."""
    target, below = abstain["target"], abstain["below"]
    if target is None:
        return None
    if below is None:
        share, best, _ = max(abstain["curves"]["validation"], key=lambda point: point[1])
        return (
            f"abstain   no threshold makes {target:.1%} of the answers on validation right: the surest {share:.1%} of rows "
            f"are, {best:.1%} of them. Every row is answered"
        )
    parts = [f"{n}: {_share(f['coverage'])} answered, {_share(f['answered_accuracy'])} of these right"
             for n, f in abstain["splits"].items()]  # fmt: skip
    return f"abstain   {threshold_said(below)}, chosen on validation; " + "; ".join(parts)


def threshold_said(below: float) -> str:
    return f"below a probability of {below:.4g}" if below > 0 else "never (a threshold of 0)"


def threshold_of_run(run: Path, step: int | None) -> tuple[float | None, str | None]:
    """The threshold in a run's `summary.json`, and a line for the user where it is that of another step's weights."""
    summary = read_json(run / "summary.json", dict, "Move it away: no threshold is known without it") or {}
    abstain = summary.get("abstain")
    below = abstain.get("below") if isinstance(abstain, dict) else None
    if type(below) not in (int, float):
        return None, None
    if summary.get("tested_step") == step:
        return below, None
    rule = (
        f"its threshold was chosen with the weights of step {summary.get('tested_step')}, and these are of step {step}"
    )
    return None, f"abstain   {rule}: every row is answered. evaluation.abstain_below=<probability> sets one"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
