"""The files of a model or an adapter, in a folder or from the hub: which they are, and that nothing but safetensors is read."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.hub import ask_hub_or_cache

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_ADAPTER_CONFIG = "tritune_adapter.json"  # of a method that PEFT does not have
_OF_AN_ADAPTER = ("*.json", ADAPTER_WEIGHTS, "*.jinja", "tokenizer.model")  # what of an adapter's repo is fetched


def find_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """One file of a folder or of a hub repo; None where there is none, or the hub cannot be asked and the cache lacks it."""
    ask_hub_or_cache(path)
    try:
        found = cached_file(
            path, name, revision=revision, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # no such folder and no such repo
        return None
    return Path(found) if found else None


def adapter_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder of the adapter at `path`, fetched if it is on the hub; None where there is no adapter.

    Raises:
        InputError: the hub has an adapter there, which cannot be fetched.
    """
    found = find_adapter_config(path, revision)
    if found is None or Path(path).is_dir():
        return found and found.parent
    try:  # the folder of a cached file is named after its commit
        return Path(snapshot_download(path, revision=found.parent.name, allow_patterns=list(_OF_AN_ADAPTER)))
    except (OSError, ValueError) as error:
        rule = f"the hub has an adapter there that cannot be fetched ({reason(error)})"
        raise InputError(
            f"model.path={path}", rule, "Download it where there is a network, and give its folder"
        ) from None


def find_adapter_config(path: str, revision: str | None = None) -> Path | None:
    """The file that says that an adapter is there: PEFT's, or one of ours."""
    return find_file(path, ADAPTER_CONFIG, revision) or find_file(path, OWN_ADAPTER_CONFIG, revision)


def weight_files(path: str, revision: str | None = None) -> list[Path]:
    """The safetensors of a whole model: one file, or those that its index names; in the order in which transformers looks.

    Raises:
        InputError: there are none, or the index names something else than a safetensors file beside it.
    """
    remedy = "It must hold whole safetensors weights of this architecture"
    single = find_file(path, SINGLE, revision)
    if single is not None:
        return [single]
    index = find_file(path, INDEX, revision)
    if index is None:
        where = (
            "it does not have"
            if Path(path).is_dir()
            else "neither the hub, as far as it can be asked, nor its cache here has"
        )
        raise InputError(f"model.path={path}", f"{where} {SINGLE} or {INDEX}", remedy)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"model.path={path}", f"its {INDEX} does not read ({reason(error)})", remedy) from None
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(c in name for c in "/\\"):
            rule = f"its {INDEX} names {name!r}, which is no safetensors file in its folder"
            raise InputError(f"model.path={path}", rule, "Download it anew from a source that you trust")
    try:
        return [Path(str(cached_file(path, name, revision=revision))) for name in names]
    except OSError as error:
        raise InputError(f"model.path={path}", reason(error), remedy) from None
