"""Whether the shards hold every element of every tensor, once and in the right dtype, by their own headers.

What reads them would cast dtypes, leave what nobody wrote as it was, and take one of two values for an element.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tritune.trainer.errors import CheckpointError
from tritune.trainer.parallel.box import Box, first_fault

HEADER_BYTES = 100_000_000  # more is refused by safetensors too
SHARDING = "DCP_SHARDING_INFO"
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
         "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def strict_json(text: str | bytes) -> Any:
    """JSON as it is defined: no NaN, no infinity, no key twice.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)


def count_of(value: Any, what: str) -> int:
    """A whole number that is not negative; true and 1.0 are none.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is {str(value)[:60]!r}")
    return value


def require_covered(directory: Path, files: Iterable[str], tensors: dict[str, Any], flat: bool = False) -> None:
    """Compare the headers of the shards with what the manifest has of each tensor.

    Args:
        flat: the boxes are of the flattened tensors.

    Raises:
        CheckpointError: elements are missing or there twice, in another dtype, or of a tensor that is not listed.
        ValueError, LookupError, TypeError, struct.error: a header is none.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    for name in files:
        for tensor, code, box in held(directory / name):
            if tensor not in tensors:
                raise CheckpointError(f"{directory / name}: the manifest has no tensor {tensor}")
            if code != CODES[tensors[tensor]["dtype"].removeprefix("torch.")]:
                raise CheckpointError(f"{directory / name}: {tensor} is {code}, not {tensors[tensor]['dtype']}")
            boxes[tensor].append(box)
    for tensor, entry in tensors.items():
        shape = [count_of(n, f"the shape of {tensor}") for n in entry["shape"]]
        _require_each_once(directory, tensor, boxes[tensor], [math.prod(shape)] if flat else shape)


def _require_each_once(directory: Path, tensor: str, boxes: list[Box], shape: list[int]) -> None:
    for box in boxes:
        inside = len(box.sizes) == len(shape) and all(
            first + size <= n for first, size, n in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside:
            said = f"a box of {list(box.sizes)} at {list(box.offsets)} is not within its shape {shape}"
            raise CheckpointError(f"{directory}: {tensor}: {said}")
    fault = first_fault(boxes, shape)
    if fault is None:
        return
    at, times = fault
    elements = f"elements from {at[0] if len(at) == 1 else list(at)} on are" if at else "its number is"
    if times:
        raise CheckpointError(f"{directory}: {tensor}: {elements} there twice")
    have = f"{tensor} has {sum(math.prod(box.sizes) for box in boxes):,} of {math.prod(shape):,} elements"
    raise CheckpointError(f"{directory}: {tensor}: {elements} missing; {have}")


def held(path: Path) -> list[tuple[str, str, Box]]:
    """Name, dtype and box of each tensor in a shard, whose values must fill the file without gap or overlap."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(path.stat().st_size, HEADER_BYTES):
            raise CheckpointError(f"{path}: its header claims {length:,} bytes")
        header = strict_json(file.read(length))
    offsets = strict_json(header.pop("__metadata__")[SHARDING])
    held, places = [], []
    for tensor, entry in header.items():
        begin, end = (count_of(n, f"the bytes of {tensor}") for n in entry["data_offsets"])
        sizes = tuple(count_of(n, f"the size of {tensor}") for n in entry["shape"])
        firsts = tuple(count_of(n, f"the place of {tensor}") for n in offsets[tensor]["saved_offsets"])
        count = math.prod(sizes)
        if not count or len(firsts) != len(sizes):
            raise CheckpointError(f"{path}: {tensor} has no box of {list(sizes)} at {list(firsts)}")
        if end - begin != count * WIDTHS[entry["dtype"]]:
            raise CheckpointError(f"{path}: {tensor} has {end - begin:,} bytes for {count:,} elements")
        places.append((begin, end))
        held.append((tensor, entry["dtype"], Box(firsts, sizes)))
    edges = [0, *(end for _, end in sorted(places))]
    if [begin for begin, _ in sorted(places)] != edges[:-1] or edges[-1] != path.stat().st_size - 8 - length:
        raise CheckpointError(f"{path}: the values of its tensors overlap, or do not fill it")
    return held


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
