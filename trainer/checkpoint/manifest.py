"""The manifest makes a directory a checkpoint: sizes and SHA-256 of every file, the shape of every tensor.

A flipped bit loads silently from safetensors and from torch's own formats, so nothing is opened before its hash agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from tritune.trainer.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "I16": 2, "BOOL": 1}


def describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after making sure that it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def write_manifest(directory: Path, step: int, files: dict[str, Any], tensors: dict[str, Any]) -> None:
    write_json(directory / MANIFEST, {"format": FORMAT, "step": step, "files": files, "tensors": tensors})


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


def verify(directory: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        CheckpointError: a file is missing, cut, changed, unlisted or a link, or a tensor is not covered.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        listed, tensors = manifest["files"], manifest["tensors"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
        shapes = {name: [int(n) for n in entry["shape"]] for name, entry in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable manifest ({type(error).__name__})") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')} is not read by this version, which reads {FORMAT}")
    for entry in directory.iterdir():
        if entry.name not in expected and entry.name != MANIFEST:
            raise CheckpointError(f"{entry}: the manifest does not list this file")
    for name, (size, digest) in expected.items():
        file = directory / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, and {size:,} were written")
        with file.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                raise CheckpointError(f"{file}: the content changed after it was written (SHA-256 differs)")
    _verify_coverage(directory, [n for n in expected if n.endswith(".safetensors")], shapes)
    return manifest


def _verify_coverage(directory: Path, files: list[str], shapes: dict[str, list[int]]) -> None:
    covered = dict.fromkeys(shapes, 0)
    for name in files:
        with (directory / name).open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for tensor, entry in header.items():
            if tensor in covered:
                begin, stop = entry["data_offsets"]
                covered[tensor] += (stop - begin) // _BYTES[entry["dtype"]]
    for tensor, shape in shapes.items():
        count = 1
        for n in shape:
            count *= n
        if covered[tensor] != count:
            raise CheckpointError(f"{directory}: {tensor} has {covered[tensor]:,} of {count:,} elements")
