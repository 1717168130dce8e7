"""The LoRA update (Hu et al. 2021, arXiv 2106.09685): y = base(x) + scaling * drop(x) A^T B^T.

Shape suffixes: K input features, N output features, R rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def lora_update_reference(y: Tensor, x: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """Return y + scaling * (x A^T) B^T.

    Args:
        y: [..., N], the frozen layer's output for the undropped input.
        x: [..., K], the input after dropout.
        a_RK, b_NR: the two factors.
    """
    return y + linear(linear(x, a_RK), b_NR * scaling)
