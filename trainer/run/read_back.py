"""A run that a verb reads: which it is, and whether its configuration is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritune.trainer.config.overrides import value_of
from tritune.trainer.errors import InputError
from tritune.trainer.redact import MARK


def run_named(overrides: list[str]) -> Path | None:
    """The run that `run.dir=` names; None without it.

    Raises:
        InputError: there is no run, or an adapter is named beside it.
    """
    given = {k: value_of(f"{k}={v}") or v for k, eq, v in (o.partition("=") for o in overrides) if eq}
    if "run.dir" not in given:
        return None
    run = Path(given["run.dir"])
    if not (run / "config.yaml").is_file():
        raise InputError(f"run.dir={run}", "it holds no run", "Give a run's directory, or model.path alone")
    if "model.adapter" in given:
        rule = f"run.dir={run} names what is read as well"
        raise InputError(
            f"model.adapter={given['model.adapter']}", rule, "Give model.path=<its base> in place of run.dir"
        )
    return run


def require_no_blanks(kept: Any, given: set[str], key: str = "") -> None:
    """Refuse a run's configuration from which a secret was kept out, unless it is given anew.

    Raises:
        InputError: it names the key.
    """
    if isinstance(kept, dict):
        for name, value in kept.items():
            require_no_blanks(value, given, f"{key}.{name}" if key else str(name))
    elif MARK in str(kept) and key not in given:
        rule = f"{MARK} stands where the run's value held a secret, which was not written down, or {MARK} itself"
        raise InputError(f"{key}={kept}", rule, f"Give it again: {key}=...")
