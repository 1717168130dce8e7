"""`method=scale`: a learnt factor for each output of the linear layers, beside a frozen base; one file from outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from tritune.trainer.config.axes import MethodConfig
from tritune.trainer.config.choices import Form
from tritune.trainer.methods.states import shapes_of


@dataclass
class ScaleConfig(MethodConfig):
    name: str = "scale"
    targets: list[str] = field(default_factory=lambda: ["down_proj"])  # ends of the layers' names

    title = "a factor for each output"
    made = {Form.merged: "Factors merged into"}  # noqa: RUF012
    freezes_base = True
    usual_rate = (5e-4, 0.781)

    def check(self, rule) -> None:
        rule(bool(self.targets), "method.targets", "no layer is named. Use e.g. [down_proj]")

    def attach(self, model, heads, seed, unused) -> None:
        model.requires_grad_(False)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name.endswith(tuple(self.targets)):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Scaled(layer))

    def facts(self) -> list[tuple[str, str]]:
        return [("targets", json.dumps(self.targets))]

    def whole_tensors(self, model, dtype, read, say) -> Iterator[tuple[str, torch.Tensor]]:
        layers = scaled(model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            owner, _, leaf = name.rpartition(".")
            layer = layers.get(owner.removesuffix(".base_layer"))
            if layer is None:
                yield name, read(tensor).to(dtype)
            elif leaf == "weight":
                yield name.replace(".base_layer.", "."), (read(layer.factor)[:, None] * read(tensor)).to(dtype)

    def whole_shapes(self, model) -> dict[str, list[int]]:
        return {n.replace(".base_layer.", "."): s for n, s in shapes_of(model).items() if not n.endswith(".factor")}


class Scaled(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        assert base.bias is None
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.base_layer, self.factor = base, nn.Parameter(torch.ones(base.out_features, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) * self.factor.to(x.dtype)


def scaled(model: nn.Module) -> dict[str, Scaled]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Scaled)}
