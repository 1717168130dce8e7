"""What a proof leaves behind: a JSON certificate, and tables for whoever watches."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tritune.trainer.redact import redact_tree
from tritune.trainer.run.directory import write_whole_json
from tritune.trainer.verify.compare import StepDifference

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


def write_certificate(
    path: Path, kind: str, tree: dict[str, Any], overrides: list[str], content: dict[str, Any]
) -> None:
    """Write `content` with what it takes to judge it: criterion, versions, machine, command, configuration.

    Args:
        tree: the configuration as plain values.
    """
    on_gpu = torch.cuda.is_available()
    head = {
        "certificate": kind,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redact_tree(["tritune", "verify", kind, *overrides]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"cpu": platform.machine(), "gpu": torch.cuda.get_device_name() if on_gpu else None},
    }
    write_whole_json(path, {**head, **content, "config": redact_tree(tree)})


def step_lines(steps: list[StepDifference]) -> list[str]:
    """A run's steps, a line each."""
    lines = ["  step        loss   difference   gradient norm   difference   parameters"]
    for s in steps:
        parameters = "     -     " if s.parameters is None else f"{s.parameters:11.1e}"
        other = "" if s.same_batch else "  other rows"
        lines.append(
            f"  {s.step:4d}  {s.loss:10.6f}   {s.loss_difference:10.1e}   {s.grad_norm:13.6f}   "
            f"{s.grad_norm_difference:10.1e}  {parameters}{other}{'' if s.holds else '  <- does not hold'}"
        )
    return lines


def worst(steps: list[StepDifference]) -> dict[str, Any]:
    """The largest relative differences of a run, and the last step's parameters."""
    return {
        "loss": max(s.loss_difference / max(abs(s.loss), 1e-12) for s in steps),
        "grad_norm": max(s.grad_norm_difference / max(abs(s.grad_norm), 1e-12) for s in steps),
        "parameters": steps[-1].parameters,
    }


def summary_table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: a row for each backend."""
    lines = [
        "| backend | ranks | loss | gradient norm | parameters at the end | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in cells.items():
        if "worst" not in cell:
            lines.append(f"| {name} | {cell['processes']} | | | | {cell['verdict']} |")
            continue
        w = cell["worst"]
        parameters = "-" if w["parameters"] is None else f"{w['parameters']:.1e}"
        figures = f"{w['loss']:.1e} | {w['grad_norm']:.1e} | {parameters}"
        lines.append(f"| {name} | {cell['processes']} | {figures} | {cell['verdict']} |")
    return lines
