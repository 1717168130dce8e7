"""The manifest makes a directory a checkpoint: sizes and SHA-256 of every file, the shape of every tensor.

A flipped bit loads silently from safetensors and from torch's own formats, so nothing is opened before its hash agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritune.trainer.checkpoint.coverage import count_of, require_covered, strict_json
from tritune.trainer.errors import CheckpointError
from tritune.trainer.regular import read_regular

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 26  # some 100 bytes a tensor and a file: a longer one was written by nobody here
FORMAT = (
    4  # 2: tensors are stored flat, their shapes are here. 3: the state says which run it is of. 4: stored as boxes
)
READ = (2, 3, FORMAT)


def describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after making sure that it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def write_manifest(directory: Path, step: int, files: dict[str, Any], tensors: dict[str, Any]) -> None:
    content = {"format": FORMAT, "step": step, "files": files, "tensors": tensors}
    write_json(directory / MANIFEST, content | {"sha256": _digest(content)})


def write_json(path: Path, content: Any) -> None:
    """Write and fsync."""
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """A new or renamed entry survives a power cut only once its directory is on the disk too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(directory: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Args:
        required: files that must be among those it lists.

    Raises:
        CheckpointError: a file is missing, cut, changed, unlisted, a link or no regular file, or a tensor is not there whole.
    """
    try:
        return _verify(directory, required)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
            struct.error) as error:  # fmt: skip
        # What broken or hostile JSON and headers raise when they are taken for what they should be.
        raise CheckpointError(f"{directory}: it does not read ({type(error).__name__}: {error})") from error


def _verify(directory: Path, required: Sequence[str]) -> dict[str, Any]:
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        manifest = strict_json(read_regular(path, MANIFEST_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{path}: it is cut or changed ({error})") from None
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"{path}: the content changed after it was written (SHA-256 differs)")
    if count_of(manifest["format"], "the format") not in READ:
        known = ", ".join(map(str, READ))
        raise CheckpointError(f"{path}: format {manifest['format']} is not read by this version, which reads {known}")
    count_of(manifest["step"], "the step")
    expected = manifest["files"]
    for name in required:
        if name not in expected:
            raise CheckpointError(f"{path}: it does not list {name}")
    for entry in directory.iterdir():
        if entry.name not in expected and entry.name != MANIFEST:
            raise CheckpointError(f"{entry}: the manifest does not list this file")
    for name, entry in expected.items():
        file = directory / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != count_of(entry["size"], f"the size of {name}"):
            raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, and {entry['size']:,} were written")
        with file.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{file}: the content changed after it was written (SHA-256 differs)")
    shards = [name for name in expected if name.endswith(".safetensors")]
    require_covered(directory, shards, manifest["tensors"], is_flat(manifest))
    return manifest


def is_flat(manifest: dict[str, Any]) -> bool:
    """Whether tensors are stored as runs of their flattened elements, and not as boxes."""
    return manifest["format"] < 4


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
