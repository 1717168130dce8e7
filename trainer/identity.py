"""Which run a checkpoint is of: the configuration's values that decide the loss curve, written into each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritune.trainer.compose import to_dict
from tritune.trainer.config import IDENTITY, Config
from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact_tree

# Where something lies says nothing of what it is. What the tokens are, the digest of the data says.
PLACES = (
    "model.path",
    "model.tokenizer",
    "model.chat_template",
    "data.train",
    "data.validation",
    "data.test",
    "data.retention",
)


def run_identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of every key of `IDENTITY` but those that name a place; JSON values, without secrets."""
    flat = _flat(redact_tree(to_dict(config)))
    chosen = {k: v for k, v in flat.items() if any(k == name or k.startswith(f"{name}.") for name in IDENTITY)}
    return {k: v for k, v in chosen.items() if k not in PLACES and not _is_path_of_source(k)}


def require_same_run(saved: Any, config: Config, checkpoint: Path) -> None:
    """Refuse a checkpoint of another run.

    Args:
        saved: what `run_identity` gave when it was written.

    Raises:
        InputError: values differ; it names them.
    """
    now = run_identity(config)
    before = saved if isinstance(saved, dict) else {}
    changes = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        rule = f"{checkpoint.name} is of a run with other values: {'; '.join(changes)[:1000]}"
        remedy = f"Restore them to go on, move {checkpoint.name} away, or give another run.dir"
        raise InputError(f"run.dir={checkpoint.parent.parent}", rule, remedy)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def _is_path_of_source(key: str) -> bool:
    return key.startswith("data.sources.") and key.endswith(".path")
