"""A whole model's weights written one tensor after another: each file's header first, then every tensor into its place.

No more of the model is in memory than the one tensor that is being written. The files are those that `save_pretrained` writes,
byte for byte: its names, its choice among the names of a tied matrix, its division into files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNED = 8  # a safetensors header is padded to a multiple of so many bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes begin in its file, and its shape."""

    file: str
    start: int
    shape: list[int]


@dataclass(frozen=True)
class Plan:
    """The files of an export before a value is known.

    Attributes:
        places: by the name that the method gives a tensor; one that is not here is a tied matrix under its other name.
        headers: the beginning of each file; sizes: its bytes in all.
        index: `model.safetensors.index.json`; None for a single file.
    """

    dtype: torch.dtype
    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    index: str | None


def plan(model: PreTrainedModel, shapes: dict[str, list[int]], dtype: torch.dtype, shard_bytes: int) -> Plan | None:
    """Settle names, files and places as `save_pretrained` does; None where it would make other tensors of these.

    Args:
        shapes: by name, in the order of the state dict.
        shard_bytes: the most bytes of a file that holds more than one tensor.

    Raises:
        RuntimeError: transformers could not load what shares memory in this model.
    """
    if not _only_renames(model):
        return None
    saved = _saved_names(model, list(shapes))
    empty = {new: torch.empty(shapes[name], dtype=dtype, device="meta") for new, name in saved.items()}
    pattern = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=shard_bytes)
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        headers[file], starts, sizes[file] = _header({n: list(empty[n].shape) for n in sorted(names)}, dtype)
        places |= {saved[n]: Place(file, starts[n], list(empty[n].shape)) for n in names}
    index = None
    if split.is_sharded:
        about = {"total_parameters": model.num_parameters(), **split.metadata}
        content = {"metadata": about, "weight_map": split.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return Plan(dtype, places, headers, sizes, index)


def write_tensors(directory: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write the files into `directory`; return their size in bytes.

    Args:
        tensors: by the names of the plan, in any order; each is let go before the next is asked for.

    Raises:
        OSError: the disk is full, say. What was written so far is there.
        ValueError: a tensor of the plan did not come, or is of another shape or dtype.
    """
    for file, header in plan.headers.items():
        (directory / file).write_bytes(header)
    waiting = dict(plan.places)
    for name, tensor in tensors:
        place = waiting.pop(name, None)
        if place is not None:
            if list(tensor.shape) != place.shape or tensor.dtype is not plan.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, and {plan.dtype} {place.shape} was said"
                )
            _write(directory / place.file, place.start, tensor)
        del tensor  # or it would stand beside the next one while that is made
    if waiting:
        raise ValueError(f"{len(waiting)} tensor(s) did not come, {min(waiting)} among them")
    if plan.index is not None:
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(plan.index, encoding="utf-8")
    return sum(plan.sizes.values())


def _write(path: Path, start: int, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    try:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(memoryview(values))  # type: ignore[arg-type]
    except OSError as error:  # of a full disk it would not say which
        raise OSError(error.errno, error.strerror, str(path)) from error


def _header(shapes: dict[str, list[int]], dtype: torch.dtype) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header, where each tensor begins in the file, and the file's size.

    Args:
        shapes: in the order of their names, which with one dtype is the order in which safetensors writes them.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        starts[name], end = end, end + size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: begin + at for n, at in starts.items()}, begin + end


def _saved_names(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The names that transformers gives tensors when it saves them -> the model's, in its order; of a tied matrix one.

    Its own functions are asked, with a number in the place of each tensor.
    """
    numbers: dict[int, Tensor] = {}
    tensors = model.state_dict(keep_vars=True)
    stand_ins = {n: numbers.setdefault(id(tensors.get(n, n)), torch.tensor([i])) for i, n in enumerate(names)}
    kept = remove_tied_weights_from_state_dict(stand_ins, model)
    return {new: names[int(number)] for new, number in revert_weight_conversion(model, kept).items()}


def _only_renames(model: PreTrainedModel) -> bool:
    """Whether transformers saves this model's tensors as they are, under whatever names."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return all(isinstance(c, WeightRenaming | PrefixChange) for c in conversions) and not model._keys_to_ignore_on_save
