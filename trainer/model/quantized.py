"""`model.storage=nf4`: the linear layers of a frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

A layer's weight is one parameter of bytes (`kernels/nf4_bytes.py`), so that every backend shards, gathers and replicates it
like any other. Embeddings, the output head, a classifier's head and norms stay as they are. A rank quantises one layer at a
time, from the file, and keeps its own part of the bytes: it never holds the model otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel
from tritune.kernels.nf4 import quantize
from tritune.kernels.nf4_bytes import from_bytes, num_bytes, to_bytes
from tritune.trainer.errors import InputError
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.box import Box

NF4 = "nf4"  # the parameter's name in a layer, where a dense one has `weight`


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in NF4 and is made dense for each product.

    It is an `nn.Linear` to whoever adapts or lists layers, and has `weight` as that has it: made anew each time.

    Args:
        layer: the dense one, with values or without (meta).
        dtype: of the dense weight: what it was quantised from.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        self.shape = torch.Size((layer.out_features, layer.in_features))
        data = torch.empty(num_bytes(self.shape), dtype=torch.uint8, device="meta")
        if layer.weight.device.type != "meta":
            data = quantized_bytes(layer.weight)
        self.nf4 = nn.Parameter(data, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Dense, [N, K]."""
        return self.dense(self.nf4)

    @property
    def stored(self) -> tuple[Tensor, torch.Size]:
        """The bytes and the shape, for kernels that make the weight dense themselves."""
        return self.nf4, self.shape

    def dense(self, data: Tensor) -> Tensor:
        """The weight [N, K] of its bytes, which are whole."""
        if data.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return from_bytes(data.detach(), self.shape).dequantize(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.nf4, self.bias, self.shape)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """x W^T + b; what is kept for backward are the bytes, and W is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(data)
        ctx.shape = shape
        return linear(x, from_bytes(data, shape).dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:  # type: ignore[override]
        (data,) = ctx.saved_tensors
        dx = dy @ from_bytes(data, ctx.shape).dequantize(dy.dtype) if ctx.needs_input_grad[0] else None
        bias = dy.reshape(-1, dy.shape[-1]).sum(dim=0) if ctx.needs_input_grad[2] else None
        return dx, None, bias, None


def quantized_bytes(weight: Tensor) -> Tensor:
    """The bytes of a weight, on the CPU; computed on a GPU where there is one.

    Raises:
        ValueError: a value is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return to_bytes(quantize(weight.detach().to(device))).cpu()


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """A weight that cannot be quantised is refused by its layer's name."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"model.storage=nf4: {layer}.weight", str(error), "Take a whole checkpoint") from None


def _dense_layers(model: PreTrainedModel, heads: list[str]) -> dict[str, nn.Linear]:
    """The linear layers but the heads, by name."""
    output = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not output and n not in heads}


def quantize_layers(model: PreTrainedModel, heads: list[str]) -> None:
    """Put an `Nf4Linear` in the place of every linear layer but the heads, one after another.

    Args:
        model: with values, or of meta tensors.

    Raises:
        InputError: there is no such layer, or a weight is not finite.
    """
    layers = _dense_layers(model, heads)
    if not layers:
        rule = f"a {model.config.model_type} has no linear layer (torch.nn.Linear) but its head"
        raise InputError("model.storage=nf4", rule, "Use model.storage=plain")
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        with _named(name):
            setattr(model.get_submodule(parent), child, Nf4Linear(layer))


def quantized_layers(model: nn.Module) -> dict[str, Nf4Linear]:
    """By name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Nf4Linear)}


class Quantized(Weights):
    """Where the bytes of a model of meta tensors come from: the dense weights, one of which is whole at a time.

    Args:
        dense: what the files hold.
        shapes: of the quantised weights, by the layer's name.
    """

    def __init__(self, dense: Weights, shapes: dict[str, torch.Size]) -> None:
        super().__init__(dense.files, dense.tensors, dense.dtype)
        self._shapes = shapes
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, box: Box) -> Tensor:
        owner, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        if leaf != NF4 or name in self.tensors:
            return super().read(name, box)
        if self._last[0] != owner:
            weight = super().read(f"{owner}.weight", Box((0, 0), tuple(self._shapes[owner])))
            with _named(owner):
                self._last = owner, quantized_bytes(weight)
        return self._last[1][box.slices]


def fill_whole(model: nn.Module, weights: Weights) -> None:
    """Give a model of meta tensors its values, one tensor after another; one that is shared stays one."""
    done: dict[int, nn.Parameter] = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            if id(parameter) not in done:
                whole = Box((0,) * parameter.ndim, tuple(parameter.shape))
                values = weights.read(names[id(parameter)], whole).clone()
                done[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, key, done[id(parameter)])


@torch.no_grad()
def round_trip(model: PreTrainedModel, heads: list[str], dtype: torch.dtype) -> None:
    """Give the dense layers of a model the values that NF4 would leave of them, for whoever reads an adapter trained on those.

    Args:
        dtype: that the run quantised from.
    """
    for layer in _dense_layers(model, heads).values():
        data = quantized_bytes(layer.weight.to(dtype))
        layer.weight.copy_(from_bytes(data, layer.weight.shape).dequantize(dtype))
