"""Whether a run directory's run is the one that a configuration asks for: by what its files hold, and not by where they lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritune.trainer.checkpoint.names import saved_steps
from tritune.trainer.config import MethodConfig, ModelConfig
from tritune.trainer.config.choices import Resume
from tritune.trainer.config.data import DataConfig
from tritune.trainer.config.identity import Identity, compared, identity_in
from tritune.trainer.errors import InputError
from tritune.trainer.model.fingerprint import difference, fingerprint
from tritune.trainer.redact import redact_tree
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.files import read_config, read_json

CONTENT = "content.json"  # `base`, the fingerprint of the base model, and `rows`, a digest of each split
# Keys that say where something lies. Another value of one of them is no other run as long as the content is the same.
_PLACES = re.compile(
    r"model\.(path|adapter|revision|tokenizer|chat_template)|data\.(train|validation|test|retention|sources\.[^.]+\.path)"
)


def check_resume(resume: Resume, identity: Identity, directory: RunDir) -> None:
    """Refuse what the directory and `run.resume` do not allow, before anything is loaded.

    Raises:
        InputError: it names every key of another value, with both; what has only moved is compared when it was read.
    """
    checkpoints = saved_steps(directory.path / "checkpoints")
    if resume is Resume.require and not checkpoints:
        raise InputError("run.resume=require", f"{directory.path} holds no checkpoint", "Check run.dir, or use auto")
    if resume is Resume.never and (directory.path / "config.yaml").exists():
        raise InputError(
            "run.resume=never", f"{directory.path} holds a run already", "Give another run.dir, or use auto"
        )
    recorded = bool(_record(directory))
    changes = [c for c in _changes(identity, directory) if not (recorded and _is_move(*c))] if checkpoints else []
    if changes:
        rule = "it holds a run that was started with other values: " + _said(changes)
        raise InputError(f"run.dir={directory.path}", rule, "Restore them to go on, or give another run.dir")


def moved(identity: Identity, directory: RunDir) -> str:
    """What lies elsewhere than when the run was last started, for a message: `; moved: data.train: a -> b`, or nothing."""
    changes = [c for c in _changes(identity, directory) if _is_move(*c)]
    return f"; moved: {_said(changes)}" if changes else ""


def require_same_base(
    model: ModelConfig,
    method: MethodConfig,
    identity: Identity,
    directory: RunDir,
    say: Callable[[str], None],
    reading: bool = False,
) -> dict[str, dict[str, str]] | None:
    """Refuse a base model that is not the one the run was started on; return its fingerprint, None for random weights.

    Args:
        reading: the run is read, and not trained on. After full training nothing is left of the base's weights.

    Raises:
        InputError: it names what differs, and where the base was.
    """
    try:
        now, before = fingerprint(model), _record(directory).get("base")
    except InputError as error:
        if reading:
            remedy = "If the run's base has moved, name its place beside run.dir: model.path=<folder or hub id>"
            raise InputError(error.value, error.rule, remedy) from None
        raise
    if now is None:
        return None
    if before is None:
        if reading and moved(identity, directory):
            say(f"base      {model.path} is taken as it is: the run did not write down what its base holds")
        return now
    differs = difference(before, redact_tree(now), weights=not reading or method.keeps_weights)
    if differs:
        rule = f"it is not the base that {directory.path} was trained on{moved(identity, directory)}; {differs}"
        raise InputError(f"model.path={model.path}", rule, "Give model.path=<folder or hub id of that base>")
    return now


def require_same_splits(rows: dict[str, str], data: DataConfig, identity: Identity, directory: RunDir) -> None:
    """Refuse splits whose tokens are other ones than the run was started on.

    Args:
        rows: a digest of each split.

    Raises:
        InputError: it names the first such split.
    """
    before: dict[str, str] = _record(directory).get("rows", {})
    for name in sorted(before.keys() | rows.keys()) if before else []:
        if before.get(name) != rows.get(name):
            given = getattr(data, name, None) or data.train
            rule = f"the split {name} has other tokens than the run was started with: the data, the tokenizer or the "
            rule += f"template changed{moved(identity, directory)}"
            kept = (read_config(directory.path) or {}).get("data")
            hint = (
                ""
                if isinstance(kept, dict) and "held_out" in kept
                else ". Versions before divided by data.held_out=hash"
            )
            raise InputError(f"data.{name}={given}", rule, f"Restore them, or give another run.dir{hint}")


def record(directory: RunDir, base: dict[str, dict[str, str]] | None, rows: dict[str, str]) -> None:
    """Write down what the run is trained on, so that it goes on wherever that lies."""
    directory.write_json(CONTENT, {"base": base, "rows": rows})


def _record(directory: RunDir) -> dict[str, Any]:
    """What was written down when the run was started; empty before a checkpoint, and of a run of an older version."""
    if not saved_steps(directory.path / "checkpoints"):
        return {}
    remedy = "Remove it: the run goes on with its model and data taken as they are, where their paths did not change"
    return read_json(directory.path / CONTENT, dict, remedy) or {}


def _changes(identity: Identity, directory: RunDir) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of what defines the run, where it differs from what the run was last started with."""
    old = read_config(directory.path)
    if old is None:
        return []
    before, now = identity_in(old), dict(identity)
    if now["optim.lr"] is None:  # it goes on with the run's own
        now["optim.lr"] = before.get("optim.lr")
    if now["model.chat_template"] is None and before.get("model.chat_template") == "plain":  # which it chose itself
        now["model.chat_template"] = "plain"
    return [(k, before.get(k), now.get(k)) for k in sorted({*before, *now}) if before.get(k) != now.get(k)]


def _is_move(key: str, old: Any, new: Any) -> bool:
    """Whether one file or folder may lie in two places: not where there was none, or what is built in."""
    if _PLACES.fullmatch(key) is None:
        return False
    return key == "model.revision" or not {old, new} & {None, "bytes", "chatml", "plain"}


def _said(changes: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{key}: {old} -> {new}" for key, old, new in changes)


def placeless(identity: Identity) -> Identity:
    """What a checkpoint is known by. Where something lies says nothing of what it is: that, the digests of `content.json` and of
    the rows say."""
    return {k: v for k, v in identity.items() if _PLACES.fullmatch(k) is None}


def require_same_run(saved: Any, identity: Identity, checkpoint: Path) -> None:
    """Refuse a checkpoint of another run.

    Args:
        saved: what `placeless` gave when it was written.

    Raises:
        InputError: values differ; it names them.
    """
    now = placeless(identity)
    before = compared(saved) if isinstance(saved, dict) else {}
    changes = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        rule = f"{checkpoint.name} is of a run with other values: {'; '.join(changes)[:1000]}"
        remedy = f"Restore them to go on, move {checkpoint.name} away, or give another run.dir"
        raise InputError(f"run.dir={checkpoint.parent.parent}", rule, remedy)
