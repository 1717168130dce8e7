"""The other forward for a LoRA group, a candidate to be measured beside the shipped one: one product over K + C features.

    [Y_1 | Y_2 | ...] = [X | S] [W | D]^T         D block-diagonal: s_i B_i in the rows of Y_i and the columns of S_i

The update is summed in float32 with the base product and rounded once, where the shipped forward (`kernels.lora`) reads each
Y_i again to add to it: at K = 4096 that is 9 % of the product, here 1.6 % for any C up to 64 (KERNELS.md, section 3). It wants
X in a buffer with C free columns, which the norm before it would have to write into, and the frozen weight stored padded. It is
shipped if it wins by 5 % on a GPU; until then it lives here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tritune.kernels.lora import Projection


class ConcatGroup:
    """Projections of one input, without dropout, their weights beside their factors in one buffer.

    Args:
        projections: dense weights without biases, all with an update.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.sizes = [p.weight.shape[0] for p in projections]
        self.a = torch.cat([p.a for p in projections])
        self.width, columns = self.a.shape[1], -(-self.a.shape[0] // 8) * 8  # rows of a multiple of 16 bytes
        weight = projections[0].weight
        self.weight = weight.new_zeros(sum(self.sizes), self.width + columns)
        self.weight[:, : self.width] = torch.cat([p.weight for p in projections])
        row = column = 0
        for p in projections:
            tail = self.weight[row : row + p.b.shape[0], self.width + column : self.width + column + p.b.shape[1]]
            tail.copy_(p.b * p.scaling)
            row, column = row + p.b.shape[0], column + p.b.shape[1]

    def buffer(self, x_MK: Tensor) -> Tensor:
        """[M, K + C] with X in its place; in a model the norm writes it there."""
        buffer = x_MK.new_zeros(x_MK.shape[0], self.weight.shape[1])
        buffer[:, : self.width] = x_MK
        return buffer

    def forward(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Return Y_i, views of one buffer [M, sum N_i]; S is written into the free columns."""
        stop = self.width + self.a.shape[0]
        torch.mm(buffer[:, : self.width], self.a.t(), out=buffer[:, self.width : stop])
        return (buffer @ self.weight.t()).split(self.sizes, dim=1)
