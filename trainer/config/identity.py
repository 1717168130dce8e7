"""What of a configuration makes a run the run that it is: the keys of `IDENTITY` with their values, as they are written down."""

from __future__ import annotations

from typing import Any

from tritune.trainer.config.compose import to_dict
from tritune.trainer.config.registry import AXES, axis_options
from tritune.trainer.config.renamed import renamed_keys
from tritune.trainer.config.schema import IDENTITY, Config
from tritune.trainer.redact import redact_tree

Identity = dict[str, Any]  # dotted key -> a JSON value without secrets
# Keys of which the rows alone tell what they did, and these are compared by their digests: a run of before there were such keys
# goes on.
_OF_THE_ROWS = {"data.held_out", "data.unsupervised"}
# Keys of a group without options that came later, with what runs did before.
_SINCE: dict[str, Any] = {"model.storage": "plain", "model.adapter": None, "model.adapter_mode": "keep"}


def identity_of(config: Config) -> Identity:
    """Of every key that decides what the loss curve is, its value as `config.yaml` has it."""
    return identity_in(redact_tree(to_dict(config)))


def identity_in(tree: Any) -> Identity:
    """The same of what `config.yaml` holds, which may be of an older version."""
    flat = compared(_flat(tree))
    return {k: v for k, v in flat.items() if any(k == name or k.startswith(f"{name}.") for name in IDENTITY)}


def compared(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value under today's names, without the keys that the rows tell of, and with those that an option has got
    since: a run from before them goes on, since their defaults do what it did."""
    found = _SINCE | {k: v for k, v in renamed_keys(flat).items() if k not in _OF_THE_ROWS}
    for axis in AXES:
        kind = axis_options(axis).get(str(found.get(f"{axis}.name")))
        if kind is not None:
            found = _flat(to_dict(kind()), f"{axis}.") | found
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
