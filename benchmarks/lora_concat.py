"""The other forward for a LoRA group, a candidate to be measured beside the shipped one: one product over K + C features.

    [Y_1 | Y_2 | ...] = [X | S] [W | D]^T         D block-diagonal: s_i B_i in the rows of Y_i and the columns of S_i

The update is summed in float32 with the base product and rounded once, where the shipped forward (`kernels.lora`) reads each
Y_i again to add to it: at K = 4096 that is 9 % of the product, here 1.6 % for any C up to 64 (KERNELS.md, section 3). It wants
X in a buffer with C free columns, which the norm before it would have to write into, and the frozen weight stored padded. It is
shipped if it wins by 5 % on a GPU; until then it lives here.

    python benchmarks/lora_concat.py            on a GPU: forward of both beside the bare product, for groups of an 8B layer
    python benchmarks/lora_concat.py --smoke    on CPU: the same code on small tensors; measures nothing
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from kernel_timing import Timer
from record import write_record
from torch import Tensor
from tritune.kernels.lora import Projection, lora_linear

GROUPS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}


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


def measured(timer: Timer, tokens: int, inputs: int, outputs: Sequence[int], rank: int) -> dict[str, float]:
    """Milliseconds (median) of the bare product, of both forwards, and of the copy that the candidate hopes to be spared."""
    dtype = torch.bfloat16 if timer.gpu else torch.float32

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=timer.device).mul_(inputs**-0.5).to(dtype)

    group = [Projection(new(n, inputs), None, new(rank, inputs), new(n, rank), 2.0) for n in outputs]
    x, candidate = new(tokens, inputs), ConcatGroup(group)
    buffer, whole = candidate.buffer(x), torch.cat([p.weight for p in group]).t()  # type: ignore[misc]
    steps = {
        "bare": lambda: x @ whole,
        "shipped": lambda: lora_linear(x, group),
        "concatenated": lambda: candidate.forward(buffer),
        "copy": lambda: buffer[:, :inputs].copy_(x),
    }
    return {name: timer.time(step, lambda: None)["p50"] for name, step in steps.items()}


def main() -> int:
    smoke = "--smoke" in sys.argv
    if not smoke and not torch.cuda.is_available():
        print("benchmarks/lora_concat.py: no CUDA GPU is here to measure on; --smoke runs it on CPU", file=sys.stderr)
        return 2
    timer, found = Timer(torch.device("cpu" if smoke else "cuda")), {}
    with torch.no_grad():
        for name, (inputs, outputs) in GROUPS.items():
            if smoke:
                inputs, outputs = 32, tuple(n // 256 for n in outputs)
            for rank in (4,) if smoke else (8, 16, 64):
                found[f"{name}, r={rank}"] = row = measured(timer, 64 if smoke else 8192, inputs, outputs, rank)
                if not smoke:
                    print(f"{name}, r={rank}: " + ", ".join(f"{n} {ms:.3f} ms" for n, ms in row.items()))
    print(f"{len(found)} groups ran" if smoke else write_record("lora_concat", {"milliseconds": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
