"""Where parameters come from when no rank holds the whole model: boxes read from safetensors, or from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.files import weight_files
from tritune.trainer.parallel.box import Box


class Weights:
    """Boxes of a model's parameters, by name.

    Args:
        files: parameter -> the file that holds it and its name there.
        tensors: parameters that are in memory: those of an adapter, say.
        dtype: what a model loaded whole would hold in; masters are made from that, here too.
    """

    def __init__(
        self, files: dict[str, tuple[Path, str]], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.files, self.tensors, self.dtype = files, tensors, dtype
        self._open: dict[Path, safe_open] = {}

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of a box of the parameter; from a file, these and no others."""
        if name in self.tensors:
            return self.tensors[name][box.slices]
        path, key = self.files[name.replace(".base_layer.", ".")]  # an adapter's layer holds the model's own
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(key)[box.slices].to(self.dtype)

    def under_own_names(self) -> bool:
        """Whether no file leaves out the beginning of the names that a model's class gives its parameters."""
        return not any(name.endswith(f".{key}") for name, (_, key) in self.files.items())

    def take(self, model: nn.Module) -> None:
        """Move what `model` holds in memory here, and leave meta tensors in its place."""
        for module_name, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type != "meta":
                    self.tensors[f"{module_name}.{name}".lstrip(".")] = parameter.detach()
                    empty = torch.empty_like(parameter, device="meta")
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def embeddings_of(model: PreTrainedModel, weights: Weights | None, ids: list[int]) -> Tensor:
    """The model's input embeddings of tokens, [ids, D]; from `weights` where the model is one of meta tensors."""
    table: Any = model.get_input_embeddings().weight
    if weights is None:
        return table[ids].clone()
    name = next(n for n, p in model.named_parameters() if p is table)
    return torch.cat([weights.read(name, Box((i, 0), (1, table.shape[1]))) for i in ids])


def find_weights(config: ModelConfig, model: PreTrainedModel, skip: set[str]) -> Weights | str:
    """Locate every parameter of `model`, whose parameters are meta tensors, in the safetensors of `config.path`.

    Args:
        skip: parameters that no file holds (a new head).

    Returns:
        the weights; or, where a name or a shape has no counterpart, why: transformers may convert it while it loads whole.

    Raises:
        InputError: there are no safetensors.
    """
    headers: dict[str, tuple[Path, str, list[int]]] = {}
    assert config.path is not None
    for path in weight_files(config.path, config.revision):
        try:
            with safe_open(path, framework="pt") as file:
                headers |= {key: (path, key, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # noqa: BLE001  whatever a broken file makes the library raise
            remedy = "It must hold whole safetensors weights of this architecture"
            raise InputError(f"model.path={config.path}", reason(error), remedy) from None
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if set(model.state_dict()) - names:
        return "it has buffers in its files"
    prefix = model.base_model_prefix + "."
    found: dict[str, tuple[Path, str]] = {}
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        names = {name, name.removeprefix(prefix), *_other_names(model, parameter)}
        entry = next((headers[n] for n in sorted(names) if n in headers), None)
        if entry is None:
            return f"no tensor of its files is named {name}"
        if list(parameter.shape) != entry[2]:
            return f"{name} has another shape there"
        found[name] = entry[:2]
    return Weights(found, {}, next(model.parameters()).dtype)


def _other_names(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """A tied matrix is stored under any of its names."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
