"""What a base model is by its content, wherever it lies and in however many files: a few blocks of every tensor are read."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.files import ADAPTER_WEIGHTS, find_file, weight_files

BLOCK, BLOCKS = 1024, 4  # bytes; of 723 tensors with 70 billion parameters, 3 MB are read
_OF_THE_WRITER = {"_name_or_path", "transformers_version"}  # keys of config.json that say nothing of the model


def fingerprint(model: ModelConfig) -> dict[str, dict[str, str]] | None:
    """`config`: key -> digest of its value; `tensors`: name -> digest of dtype, shape and some bytes. None for random weights.

    Raises:
        InputError: its files do not read.
    """
    if model.path is None:
        return None
    found = find_file(model.path, "config.json", model.revision)
    tensors: dict[str, str] = {}
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if found else {}
        for path in weight_files(model.path, model.revision):
            tensors |= _tensors(path)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, struct.error) as error:
        remedy = "It must hold whole safetensors weights of this architecture"
        raise InputError(f"model.path={model.path}", reason(error), remedy) from None
    keys = {k: _digest(json.dumps(v, sort_keys=True).encode()) for k, v in config.items() if k not in _OF_THE_WRITER}
    found_parts = {"config": dict(sorted(keys.items())), "tensors": dict(sorted(tensors.items()))}
    if model.adapter is not None:
        found_parts["begun_with"] = _tensors(Path(model.adapter) / ADAPTER_WEIGHTS)
    return found_parts


def difference(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]], weights: bool = True) -> str | None:
    """What of two fingerprints is not the same, in words; None where they agree.

    Args:
        weights: whether the tensors count.
    """
    parts = {"config": "key(s) of its config.json", "begun_with": "tensor(s) of the adapter that it began with"}
    for part, what in (parts | ({"tensors": "tensor(s)"} if weights else {})).items():
        before, now = old.get(part, {}), new.get(part, {})
        if part == "begun_with" and not now:  # a run is read that holds all of it
            continue
        differ = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        if differ:
            return f"{len(differ):,} {what} differ: {', '.join(differ[:3])}{' ...' if len(differ) > 3 else ''}"
    return None


def _tensors(path: Path) -> dict[str, str]:
    """The digest of each tensor of a safetensors file: eight bytes of length, a JSON header, the values."""
    found = {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop:
                raise ValueError(f"{path.name} has a tensor of a negative size")
            hashed = blake2b(f"{entry['dtype']} {entry['shape']}".encode(), digest_size=8)
            for offset, size in _blocks(name, stop - start):
                file.seek(8 + length + start + offset)
                hashed.update(file.read(size))
            found[name] = hashed.hexdigest()
    return found


def _blocks(name: str, size: int) -> list[tuple[int, int]]:
    """Offset and size of what is read of a tensor of `size` bytes: both ends, and places that its name draws."""
    if size <= BLOCK * BLOCKS:
        return [(0, size)]
    last = size - BLOCK
    drawn = [int.from_bytes(blake2b(f"{name} {i}".encode(), digest_size=8).digest()) % last for i in range(BLOCKS - 2)]
    return [(offset, BLOCK) for offset in (0, *sorted(drawn), last)]


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
