"""What `kernels.py` measures: each case's shape, its inputs, its formula in plain PyTorch, and the least work it must do.

The formulas are transformers', written so that they take any dtype: in bfloat16 they are the eager provider and what
torch.compile gets, in float64 the truth. `products` and `traffic` are what no implementation can leave out; the floor is
made of them, measured on the same GPU in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, gelu, linear, silu
from tritune.kernels.dropout import dropout_reference, token_keys
from tritune.kernels.nf4 import dequantize_reference, quantize

KERNELS = ("linear_cross_entropy", "lora", "rms_norm", "add_rms_norm", "rope", "swiglu", "geglu", "nf4")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
SCALING, EPS, SPREAD = 2.0, 1e-5, 3.0  # of LoRA's update, of norms, of the logits of classes that are not the target
SMALL = {  # --smoke: for the interpreter on CPU
    "tokens": 32, "hidden": 64, "vocabulary": 512, "kv": 16, "mlp": 96, "rank": 4, "rows": 2, "length": 16, "heads": 4,
    "kv_heads": 2, "head": 16, "outputs": 96, "inputs": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What the project wants of forward + backward: milliseconds, GB over inputs, share of the floor's speed."""

    milliseconds: float | None = None
    gigabytes: float | None = None
    of_floor: float | None = None


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        sizes: its dimensions by name.
        trains: whether the head, or the norm's weight, trains.
        ignored: share of tokens without a target.
        p: LoRA's rate of dropping.
    """

    kernel: str
    sizes: dict[str, int]
    trains: bool = False
    ignored: float = 0.0
    p: float = 0.0
    target: Target | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        words = [self.kernel, *(f"{k}{v}" for k, v in self.sizes.items())]
        if self.kernel in ("linear_cross_entropy", "rms_norm", "add_rms_norm"):
            words.append("trained" if self.trains else "frozen")
        words += [f"ignored{self.ignored:g}"] if self.ignored else []
        return "-".join(words + ([f"dropout{self.p:g}"] if self.p else []))

    @property
    def kept(self) -> int:
        """Tokens that have a target."""
        return self.sizes["tokens"] - round(self.sizes["tokens"] * self.ignored)

    def small(self) -> Case:
        return replace(self, sizes={k: SMALL[k] for k in self.sizes}, target=None)

    def shorter(self, flops: float) -> Case:
        """The same with as many tokens as need at most so many FLOPs."""
        case = self
        while sum(p.flops for side in products(case) for p in side) > flops:
            case = replace(case, sizes=case.sizes | {"tokens": case.sizes["tokens"] // 2})
        return case


def all_cases() -> list[Case]:
    """The headline first: what a budget cuts is at the end."""

    def head(tokens: int, hidden: int, vocabulary: int, **options: Any) -> Case:
        return Case("linear_cross_entropy", {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}, **options)

    def norm(kernel: str, hidden: int, trains: bool) -> Case:
        return Case(kernel, {"tokens": 8192, "hidden": hidden}, trains=trains, target=Target(of_floor=0.85))

    layer = {"tokens": 8192, "hidden": 4096, "kv": 1024, "mlp": 14336}
    rotation = {"rows": 4, "length": 2048, "heads": 32, "kv_heads": 8, "head": 128}
    ends = Target(of_floor=0.85)
    return [
        head(8192, 4096, 128256, target=Target(24.0, 0.6)),
        head(8192, 4096, 128256, trains=True, target=Target(36.0)),
        Case("lora", layer | {"rank": 16}, target=Target(of_floor=1 / 1.1)),
        norm("rms_norm", 4096, False),
        norm("add_rms_norm", 4096, False),
        Case("rope", rotation, target=ends),
        Case("swiglu", {"tokens": 8192, "mlp": 14336}, target=ends),
        Case("geglu", {"tokens": 8192, "mlp": 6912}, target=ends),
        Case("nf4", {"outputs": 14336, "inputs": 4096}, target=Target(of_floor=0.8)),
        Case("lora", layer | {"rank": 16}, p=0.05, target=Target(of_floor=1 / 1.1)),
        head(8192, 4096, 128256, ignored=0.5),
        head(8192, 4096, 128256, trains=True, ignored=0.5),
        norm("rms_norm", 4096, True),
        norm("rms_norm", 8192, False),
        norm("rms_norm", 8192, True),
        *(
            Case("lora", layer | {"rank": rank}, p=p, target=Target(of_floor=1 / 1.1))
            for rank in (8, 64)
            for p in (0, 0.05)
        ),
        head(2048, 4096, 128256),
        head(8192, 2048, 128256, trains=True),
        head(8192, 3584, 152064, trains=True),
        head(8192, 1152, 262144, trains=True),
        head(16384, 4096, 128256),
    ]


def linear_sizes(case: Case) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a decoder layer's seven linears."""
    s = case.sizes
    hidden, kv, mlp = s["hidden"], s["kv"], s["mlp"]
    sizes = [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (mlp, hidden),
        (mlp, hidden),
        (hidden, mlp),
    ]
    return dict(zip(LINEARS, sizes, strict=True))


class Product(NamedTuple):
    """[m, k] x [k, n], its factors stored as they are or transposed."""

    m: int
    k: int
    n: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


def products(case: Case) -> tuple[list[Product], list[Product]]:
    """What forward and backward must multiply, LoRA's own small factors not counted."""
    if case.kernel == "linear_cross_entropy":
        rows, hidden, vocabulary = case.kept, case.sizes["hidden"], case.sizes["vocabulary"]
        backward = [Product(rows, vocabulary, hidden)]
        if case.trains:
            backward.append(Product(vocabulary, rows, hidden, left_transposed=True))
        return [Product(rows, hidden, vocabulary, right_transposed=True)], backward
    if case.kernel == "lora":
        rows, sizes = case.sizes["tokens"], linear_sizes(case).values()
        return [Product(rows, k, n, right_transposed=True) for n, k in sizes], [Product(rows, n, k) for n, k in sizes]
    return [], []


def traffic(case: Case, itemsize: int) -> tuple[int, int]:
    """Bytes that forward and backward must move beside the products, each operand once; of LoRA's layer SwiGLU's."""
    s = case.sizes
    if case.kernel in ("swiglu", "geglu", "lora"):
        one = s["tokens"] * s["mlp"] * itemsize
        return 3 * one, 5 * one
    if case.kernel in ("rms_norm", "add_rms_norm"):
        one = s["tokens"] * s["hidden"] * itemsize
        return (2 * one, 3 * one) if case.kernel == "rms_norm" else (4 * one, 4 * one)
    if case.kernel == "rope":
        tokens = s["rows"] * s["length"]
        one = (2 * tokens * (s["heads"] + s["kv_heads"]) + 2 * s["length"]) * s["head"] * itemsize
        return one, one
    if case.kernel == "nf4":
        numel = s["outputs"] * s["inputs"]
        return numel // 2 + numel // 64 + numel // 16384 * 4 + numel * itemsize, 0
    return 0, 0


@dataclass
class Inputs:
    """A case's tensors. A provider may replace some by its own (other adapters, another layout).

    Attributes:
        tensors: by name; what a gradient is taken of is an `nn.Parameter`.
        extras: what is no tensor: the NF4 weight, LoRA's keys.
        keyed: dropout shall draw the masks that the truth has, where the provider can.
    """

    tensors: dict[str, Any]
    extras: dict[str, Any]
    keyed: bool = False

    @property
    def wanted(self) -> list[str]:
        return [n for n, t in self.tensors.items() if t.requires_grad]


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Seeded, and never constant: GPUs multiply zeros faster."""
    generator, s = torch.Generator(device).manual_seed(0), case.sizes

    def new(*shape: int, scale: float = 1.0, grad: bool = True, kind: torch.dtype = dtype) -> nn.Parameter:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return nn.Parameter((values * scale).to(kind), requires_grad=grad)

    if case.kernel == "linear_cross_entropy":
        return Inputs(_head_inputs(case, new, generator, device, dtype), {})
    if case.kernel == "lora":
        tensors: dict[str, Any] = {name: new(s["tokens"], s["hidden"]) for name in ("x", "attended", "normed")}
        for name, (n, k) in linear_sizes(case).items():
            tensors["w_" + name] = new(n, k, scale=k**-0.5, grad=False)
            tensors["a_" + name] = new(s["rank"], k, scale=k**-0.5, kind=torch.float32)
            tensors["b_" + name] = new(n, s["rank"], scale=0.02, kind=torch.float32)
        keys = token_keys(0, 0, torch.zeros(1, dtype=torch.int64, device=device), s["tokens"])[0]
        return Inputs(tensors, {"keys": keys})
    if case.kernel in ("rms_norm", "add_rms_norm"):
        tensors = {"x": new(s["tokens"], s["hidden"])}
        if case.kernel == "add_rms_norm":
            tensors["residual"] = new(s["tokens"], s["hidden"])
        weight = torch.rand(s["hidden"], generator=generator, device=device) + 0.5
        return Inputs(tensors | {"weight": nn.Parameter(weight.to(dtype), requires_grad=case.trains)}, {})
    if case.kernel == "rope":
        q, k = (new(s["rows"], s["length"], s[heads], s["head"]) for heads in ("heads", "kv_heads"))
        frequencies = 500000.0 ** (-torch.arange(0, s["head"], 2, device=device) / s["head"])
        angles = (torch.arange(s["length"], device=device)[:, None] * frequencies).repeat(1, 2)[None]
        return Inputs({"q": q, "k": k, "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}, {})
    if case.kernel in ("swiglu", "geglu"):
        return Inputs({"gate": new(s["tokens"], s["mlp"]), "up": new(s["tokens"], s["mlp"])}, {})
    return Inputs({}, {"weight": quantize(new(s["outputs"], s["inputs"], scale=0.02)), "dtype": dtype})


def _head_inputs(
    case: Case, new: Callable[..., nn.Parameter], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Logits as a trained model has them, losses of 2 to 3 nats: implementations that skip small gradients skip some.

    A hidden state is its target's row of the head, of length 1, times such a factor that its logit is 2 below the
    logsumexp of the others, which are normal with the standard deviation SPREAD: ln V + SPREAD^2 / 2.
    """
    s = case.sizes
    weight = new(s["vocabulary"], s["hidden"], scale=s["hidden"] ** -0.5, grad=case.trains)
    targets = torch.randint(s["vocabulary"], (s["tokens"],), generator=generator, device=device)
    pull = math.log(s["vocabulary"]) + SPREAD**2 / 2 - 2.0
    hidden = new(s["tokens"], s["hidden"], scale=SPREAD, grad=False) + pull * weight.detach()[targets]
    order = torch.randperm(s["tokens"], generator=generator, device=device)
    targets[order[: s["tokens"] - case.kept]] = -100
    return {"hidden": nn.Parameter(hidden.to(dtype)), "weight": weight, "targets": targets}


def formula(case: Case, t: dict[str, Any], extras: dict[str, Any], keyed: bool = False) -> tuple[Tensor, ...]:
    """What the case computes. `keyed`: dropout by the tokens' keys instead of PyTorch's generator."""
    if case.kernel == "linear_cross_entropy":
        logits = linear(t["hidden"], t["weight"])
        return (cross_entropy(_wide(logits), t["targets"]),)
    if case.kernel == "lora":
        return _layer(case, t, extras["keys"] if keyed else None)
    if case.kernel == "rms_norm":
        return (_norm(t["x"], t["weight"]),)
    if case.kernel == "add_rms_norm":
        total = t["residual"] + t["x"]
        return _norm(total, t["weight"]), total
    if case.kernel == "rope":
        cos, sin = t["cos"][:, None], t["sin"][:, None]
        q, k = t["q"].transpose(1, 2), t["k"].transpose(1, 2)
        return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
    if case.kernel == "swiglu":
        return (silu(t["gate"]) * t["up"],)
    if case.kernel == "geglu":
        return (gelu(t["gate"], approximate="tanh") * t["up"],)
    return (dequantize_reference(extras["weight"], extras["dtype"]),)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    z = _wide(x)
    return weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _layer(case: Case, t: dict[str, Any], keys: Tensor | None) -> tuple[Tensor, ...]:
    """The linears of a decoder layer, each group on an input of its own: attention between them is left out."""

    def apply(name: str, x: Tensor) -> Tensor:
        base = linear(x, t["w_" + name])
        if "a_" + name not in t:
            return base
        dropped = x
        if case.p:
            dropped = dropout(x, case.p) if keys is None else dropout_reference(x, keys, LINEARS.index(name), case.p)
        a, b = t["a_" + name].to(x.dtype), t["b_" + name].to(x.dtype)
        return base + linear(linear(dropped, a), b) * SCALING

    x, normed = t["x"], t["normed"]
    hidden = silu(apply("gate", normed)) * apply("up", normed)
    return apply("q", x), apply("k", x), apply("v", x), apply("o", t["attended"]), apply("down", hidden)
