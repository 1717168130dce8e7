"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA that also learns how long each row of the updated weight is.

    Y = X V^T m / |V| + b        V = W + s B A, |V| the norm of each row, a constant of the step (the paper's section 4.3)

What trains is m - |W|, which starts at zero, and not m itself: the steps of AdamW are the same, since m does not decay, but
in bfloat16 m would move in steps of 1/256 of itself, and a start would have to be read off weights that no rank holds
whole. The factor applied is 1 + (m - |V|) / |V| for the same reason.

|V| costs no matrix of W's size: |V|^2 = |W|^2 + 2 s W A^T . B + s^2 (B A A^T) . B, row by row, where W A^T is as much
work as R more tokens. W is read once more for |W|.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D
from tritune.trainer.errors import InputError
from tritune.trainer.methods.linear import features, oriented, read_weight
from tritune.trainer.methods.states import Read
from tritune.trainer.methods.token_keys import TokenKeys, layer_id_of

if TYPE_CHECKING:
    from tritune.trainer.methods.lora import LoraConfig


class DoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update, and a learnt length for each row of their sum.

    With dropout it computes what PEFT does: the base's part sees all of x, only the change of length sees drop(x).

    Args:
        As of `LoRALinear`.

    Raises:
        InputError: a row of the base's weight is zero, and has no direction; in the first forward where weights come later.
    """

    own = ("lora_A", "lora_B", "magnitude_change")
    direct = False  # as in LoRALinear

    def __init__(self, base_layer: nn.Linear | Conv1D, config: LoraConfig, name: str, keys: TokenKeys) -> None:
        super().__init__()
        dtype, (inputs, outputs) = torch.promote_types(base_layer.weight.dtype, torch.float32), features(base_layer)
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.empty(config.rank_of(name), inputs, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank_of(name), dtype=dtype))
        self.magnitude_change = nn.Parameter(torch.zeros(outputs, dtype=dtype))
        self.scaling, self.p, self.layer_id = config.scaling_of(name), config.dropout, layer_id_of(name)
        self.keys = keys
        # ZeRO-3 gathers the base's weight in this module's hooks as well as in its own: the norm needs it here.
        self.computes = [base_layer]
        self.name, self.looked_at = name, False
        if base_layer.weight.device.type != "meta":
            self._require_lengths(_norms(self._weight()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view_as(x)  # as in LoRALinear
        change, bias = self._change().to(x.dtype), self.base_layer.bias
        drops = self.p and self.training
        seen = self.keys.dropout(x, self.layer_id, self.p) if drops else x
        # By the base's own forward: it keeps no dense weight for backward where it holds a quantised one.
        y, added = self._base(x), linear(linear(seen, self.lora_A), self.lora_B * self.scaling)
        along = self._base(seen) if drops else y
        along = along if bias is None else along - bias
        return y + added + change * (along + added)

    def _base(self, x: Tensor) -> Tensor:
        return self.base_layer.forward(x) if self.direct else self.base_layer(x)

    def merged(self, weight: Tensor, read: Read) -> Tensor:
        """The weight that alone computes what this layer does: [N, K] from [N, K], in its dtype."""
        a, b, changed = (read(p).to(weight.dtype) for p in (self.lora_A, self.lora_B, self.magnitude_change))
        updated = weight + self.scaling * (b @ a)
        return updated * ((_norms(weight) + changed) / _norms(updated))[:, None]

    def saved(self, read: Read) -> dict[str, Tensor]:
        """What an adapter's file holds of this layer, by PEFT's names."""
        norms = _norms(oriented(self.base_layer, read_weight(self.base_layer, read)))
        magnitude = norms + read(self.magnitude_change).to(norms.device)
        return {
            "lora_A.weight": read(self.lora_A),
            "lora_B.weight": read(self.lora_B),
            "lora_magnitude_vector": magnitude,
        }

    def _require_lengths(self, norms: Tensor) -> None:
        """Refuse rows without a direction: at once where weights are here, else in the first forward."""
        if not norms.all():
            rule = f"a row of {self.name} is zero, and DoRA learns by how much its length changes"
            raise InputError("method.dora=true", rule, f"Add {self.name} to method.exclude, or use method.dora=false")
        self.looked_at = True

    def _weight(self) -> Tensor:
        return oriented(self.base_layer, self.base_layer.weight)

    def _change(self) -> Tensor:
        """(m - |V|) / |V|, [N] in float32 or wider; the gradient is that of m alone."""
        with torch.no_grad():
            weight = self._weight()
            base = _norms(weight)
            if not (self.looked_at or torch.compiler.is_compiling()):
                self._require_lengths(base)
            a, b = self.lora_A.to(base.dtype), self.lora_B.to(base.dtype)
            across = linear(self.lora_A.to(weight.dtype), weight).t().to(base.dtype)  # W A^T, [N, R]
            square = base.square() + ((2.0 * across + self.scaling * (b @ (a @ a.t()))) * (self.scaling * b)).sum(dim=1)
            norms = square.sqrt()
        return (self.magnitude_change + (base - norms)) / norms


def _norms(weight: Tensor) -> Tensor:
    """The length of each row of [N, K], in float32 or wider; no copy of a narrower weight is made."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
