"""The tensors of a verified checkpoint, one at a time and whole: an export is written so where no rank holds the model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tritune.trainer.checkpoint.coverage import held
from tritune.trainer.checkpoint.manifest import is_flat
from tritune.trainer.checkpoint.tensors import require_possible
from tritune.trainer.parallel.box import Box


class TensorReader:
    """Reads what any number of ranks wrote, without a collective.

    Args:
        directory, manifest: as `CheckpointStore` found them: every element is there once, in the dtype that the manifest says.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self._directory, self._entries, self._flat = directory, manifest["tensors"], is_flat(manifest)
        self._places: dict[str, list[tuple[Path, Box]]] = defaultdict(list)
        self._open: dict[Path, safe_open] = {}
        for file in manifest["files"]:
            if file.endswith(".safetensors"):
                for name, _, box in held(directory / file):
                    self._places[name].append((directory / file, box))

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype and shape of the manifest; not to be written to.

        Raises:
            CheckpointError: it has values such as no run has.
        """
        shape, places = self._entries[name]["shape"], self._places[name]
        if len(places) == 1:
            values = self._stored(places[0][0], name).view(shape)
        else:
            values = torch.empty(shape, dtype=getattr(torch, self._entries[name]["dtype"].removeprefix("torch.")))
            target = values.view(-1) if self._flat else values
            for path, box in places:
                target[box.slices] = self._stored(path, name)
        require_possible(self._directory, name, values)
        return values

    def _stored(self, path: Path, name: str) -> Tensor:
        if path not in self._open:  # once: its header has as many entries as the model has tensors
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(name)
