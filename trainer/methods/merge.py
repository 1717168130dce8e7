"""LoRA merged into the weights it adapts, W + s B A or DoRA's of other lengths; refused where it would be another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from tritune.trainer.errors import InputError
from tritune.trainer.methods.linear import oriented
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.methods.states import Read, shapes_of
from tritune.trainer.model.load import is_tied
from tritune.trainer.model.quantized import NF4, quantized_layers

MAX_LOST = 0.5  # share of an update, by norm, that rounding the merged weights may take


def merged_tensors(
    model: PreTrainedModel, dtype: torch.dtype, read: Read, say: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """The state dict in `dtype` under the base model's names, updates merged in float32 or wider, one tensor at a time.

    Raises:
        InputError: the base is quantised, the tied output head is adapted, or (at the end) rounding would take most of the
            update.
    """
    require_mergeable(model)
    layers, packed, rounding = lora_layers(model), quantized_layers(model), Rounding()
    if packed:
        say(f"export    merged into what nf4 left of {len(packed)} layers' weights, made dense again")
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        values = read(tensor)
        if leaf == NF4:
            name, leaf, values = f"{owner}.weight", "weight", packed[owner].dense(values)
        if owner in layers and leaf in layers[owner].own:
            continue
        layer = layers.get(owner.removesuffix(".base_layer"))
        if layer is None or not owner.endswith(".base_layer") or leaf != "weight":
            yield name.replace(".base_layer.", ".") if layer is not None else name, values.to(dtype)
            continue
        before = oriented(layer.base_layer, values.to(torch.promote_types(values.dtype, torch.float32)))
        result = rounding.add(name, before, layer.merged(before, read), dtype)
        yield f"{owner.removesuffix('.base_layer')}.weight", oriented(layer.base_layer, result).contiguous()
    rounding.settle(
        f"export.dtype={str(dtype).removeprefix('torch.')}", say, "Use export.dtype=float32, or form=adapter"
    )


class Rounding:
    """Keeps account of what the export's dtype takes of the updates."""

    def __init__(self) -> None:
        self.lost, self.total, self.worst = 0.0, 0.0, ("", 0.0)

    def add(self, name: str, before: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `exact` in `dtype`, which is used up; both weights are in float32 or wider, `before` perhaps the model's own."""
        size = float(torch.linalg.vector_norm(exact - before)) ** 2
        result = exact.to(dtype)
        error = float(exact.sub_(result).square_().sum()) if dtype is not exact.dtype else 0.0
        self.lost, self.total = self.lost + error, self.total + size
        if size and error / size > self.worst[1]:
            self.worst = (name, error / size)
        return result

    def settle(self, key: str, say: Callable[[str], None], remedy: str) -> None:
        """Say what was taken.

        Args:
            key: the setting that named the dtype, with its value.

        Raises:
            InputError: it is most of what was trained; with `remedy`.
        """
        share = (self.lost / self.total) ** 0.5 if self.total else 0.0
        if share > MAX_LOST:
            rule = (
                f"rounding the merged weights to it takes {share:.0%} of the update (by norm; most in {self.worst[0]})"
            )
            raise InputError(key, rule, remedy)
        if share > 0.01:
            say(f"merge     rounding to {key} takes {share:.1%} of the update, by norm")


def require_mergeable(model: PreTrainedModel) -> None:
    """Refuse what would be merged wrongly without a word.

    Raises:
        InputError: as `merged_tensors`.
    """
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        rule = "the base is quantised: merging rounds the update to its few bits"
        raise InputError("export.form=merged", rule, "Use export.form=adapter, or train on the unquantised model")
    output = model.get_output_embeddings()
    layers = lora_layers(model)
    if is_tied(model) and any(layer is output for layer in layers.values()):
        rule = "the output head is adapted and is one matrix with the embeddings, which would change as well"
        raise InputError("export.form=merged", rule, "Use export.form=adapter")
    weights: dict[int, str] = {}
    for name, layer in layers.items():
        first = weights.setdefault(id(next(layer.base_layer.parameters())), name)
        if first != name:
            rule = f"{first} and {name} share one matrix and have an update each"
            raise InputError("export.form=merged", rule, "Use export.form=adapter")


def merged_shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Names and shapes of `merged_tensors`, from a model without values."""
    layers = lora_layers(model)
    shapes: dict[str, list[int]] = {}
    packed = quantized_layers(model)
    for name, shape in shapes_of(model).items():
        owner, _, leaf = name.rpartition(".")
        if leaf == NF4:
            name, shape = f"{owner}.weight", list(packed[owner].shape)
        if owner not in layers or leaf not in layers[owner].own:
            shapes[name.replace(".base_layer.", ".") if owner.removesuffix(".base_layer") in layers else name] = shape
    return shapes
