"""How `kernels.py` measures: milliseconds, memory over the inputs, errors against float64, and the floors of a case.

A repetition on a GPU: inputs that gradients are taken of are put back (some peers write over them), the L2 cache is
flushed, the GPU sleeps for as long as the host needs to launch the step, and CUDA events stand around the step. Without the sleep
short kernels would measure Python. `host_ms` is what the host took, which a step as short as that waits for.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_cases import Case, Inputs, Product, formula, make_inputs, products, traffic
from torch import Tensor

REPETITIONS, SECONDS, WARM_UP = 50, 1.0, 0.020
FLUSH_BYTES = 2**28  # more than twice the L2 cache of any GPU so far
COPY_BYTES = 2**30
CYCLES = 2.0e9  # a second, about; `torch.cuda._sleep` counts in them
TRUTH_FLOPS = 3e13  # in float64: about a second on an H200
SLICE = 2**24  # elements compared at a time
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"

Step = Callable[[], Any]
Build = Callable[[Case, Inputs], Callable[[], Sequence[Tensor]]]


class Timer:
    """Times steps on one device; in a smoke run each is run once, by the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.gpu else 1, dtype=torch.int8, device=device)

    def time(self, step: Step, restore: Step, seconds: float = SECONDS) -> dict[str, Any]:
        """Milliseconds at 20, 50 and 80 %, until both 50 repetitions or `seconds` are reached, whichever is first.

        Args:
            restore: called before each repetition, not timed.
        """
        if not self.gpu:
            restore()
            began = time.perf_counter()
            step()
            took = 1000 * (time.perf_counter() - began)
            return {"p20": took, "p50": took, "p80": took, "repetitions": 1, "host_ms": took}
        host = self._warm_up(step, restore)
        sleep = int(min(1.5 * host, 0.005) * CYCLES)
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        began = time.perf_counter()
        while len(pairs) < REPETITIONS and time.perf_counter() - began < seconds:
            for _ in range(5):
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                restore()
                self._flush.zero_()
                torch.cuda._sleep(sleep)
                pair[0].record()
                step()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
        took = sorted(a.elapsed_time(b) for a, b in pairs)
        p20, p50, p80 = (took[int(share * (len(took) - 1) + 0.5)] for share in (0.2, 0.5, 0.8))
        return {"p20": p20, "p50": p50, "p80": p80, "repetitions": len(took), "host_ms": 1000 * host}

    def _warm_up(self, step: Step, restore: Step) -> float:
        """Compile, fill caches, raise the clocks; return the seconds the host takes to launch a step."""
        restore()
        step()
        torch.cuda.synchronize()
        began, count, host = time.perf_counter(), 0, 0.0
        while count < 3 or time.perf_counter() - began < WARM_UP:
            restore()
            torch.cuda.synchronize()
            at = time.perf_counter()
            step()
            host = time.perf_counter() - at
            torch.cuda.synchronize()
            count += 1
        return host

    def peak(self, step: Step, restore: Step) -> int | None:
        """Bytes at the peak of one step over what stood before it, gradients that it returns included."""
        if not self.gpu:
            return None
        restore()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


def upstreams(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to begin backward with: one for a loss, random ones otherwise, the same for every provider."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.ones_like(y) if y.ndim == 0 else torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
        for y in (y.detach() for y in outputs)
    ]


def truth(case: Case, inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of what is wanted, in float64, of the inputs as they are after their own rounding."""
    names = inputs.wanted
    wide: dict[str, Any] = {
        n: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in inputs.tensors.items()
    }
    if case.kernel == "linear_cross_entropy":
        return _head_truth(case, wide)
    extras = inputs.extras | ({"dtype": torch.float64} if case.kernel == "nf4" else {})
    outputs = formula(case, wide, extras, keyed=True)
    found = torch.autograd.grad(outputs, [wide[n] for n in names], [g.double() for g in gradients]) if names else ()
    return [y.detach() for y in outputs] + list(found)


def _head_truth(case: Case, t: dict[str, Any], chunk: int = 1024) -> list[Tensor]:
    """The mean loss and its gradients, the logits of a chunk of tokens at a time."""
    hidden, weight, targets = t["hidden"].detach(), t["weight"].detach(), t["targets"]
    rows = torch.nonzero(targets >= 0)[:, 0]
    loss, dx = hidden.new_zeros(()), torch.zeros_like(hidden)
    dw = torch.zeros_like(weight) if case.trains else None
    for part in rows.split(chunk):
        z = hidden[part] @ weight.t()
        lse = z.logsumexp(-1, keepdim=True)
        right = targets[part][:, None]
        loss += (lse - z.gather(1, right)).sum() / len(rows)
        z.sub_(lse).exp_().div_(len(rows))
        z.scatter_add_(1, right, torch.full_like(lse, -1.0 / len(rows)))
        dx[part] = z @ weight
        if dw is not None:
            dw.addmm_(z.t(), hidden[part])
    return [loss, dx] if dw is None else [loss, dx, dw]


def errors(names: Sequence[str], got: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """By name: the largest error over the largest value, and the RMS error over the RMS value; None: not finite."""
    result = {}
    for name, y, truly in zip(names, got, exact, strict=True):
        y, truly = y.detach().reshape(-1), truly.reshape(-1)
        most = error_squares = squares = torch.zeros((), dtype=torch.float64, device=truly.device)
        largest = most
        for start in range(0, truly.numel(), SLICE):
            value = truly[start : start + SLICE]
            error = y[start : start + SLICE].double() - value
            most, largest = torch.maximum(most, error.abs().max()), torch.maximum(largest, value.abs().max())
            error_squares, squares = error_squares + error.square().sum(), squares + value.square().sum()
        figures = {"max": float(most / largest), "rms": float((error_squares / squares).sqrt())}
        result[name] = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    return result


def output_names(case: Case) -> list[str]:
    if case.kernel == "linear_cross_entropy":
        return ["loss"]
    if case.kernel == "lora":
        return ["q", "k", "v", "o", "down"]
    if case.kernel == "rope":
        return ["rotated q", "rotated k"]
    return ["y", "sum"] if case.kernel == "add_rms_norm" else ["y"]


def floor(case: Case, timer: Timer, dtype: torch.dtype, seconds: float, bandwidth: float) -> dict[str, Any]:
    """The case's products by cuBLAS, and its other bytes at the speed of a copy."""
    figures: dict[str, Any] = {}
    sides = {}
    for side, group, moved in zip(("forward", "backward"), products(case), traffic(case, dtype.itemsize), strict=True):
        gemm = _gemm_ms(group, timer, dtype, seconds / 2) if group else 0.0
        sides[side] = gemm + 1000 * moved / bandwidth
        figures |= {f"{side}_gemm_ms": gemm, f"{side}_bytes": moved, f"{side}_flops": sum(p.flops for p in group)}
    return figures | {
        "copy_bytes_per_second": bandwidth, "forward_ms": sides["forward"], "both_ms": sum(sides.values()),
    }  # fmt: skip


def _gemm_ms(group: Sequence[Product], timer: Timer, dtype: torch.dtype, seconds: float) -> float:
    """All of a group one after the other, in one measurement: between them is no pause."""
    sizes = {p: ((p.k, p.m) if p.left_transposed else (p.m, p.k), (p.n, p.k) if p.right_transposed else (p.k, p.n))
             for p in group}  # fmt: skip
    factors = {p: [torch.randn(s, device=timer.device).to(dtype) for s in pair] for p, pair in sizes.items()}
    outs = {p: torch.empty(p.m, p.n, device=timer.device, dtype=dtype) for p in factors}

    def step() -> None:
        for p in group:
            left, right = factors[p]
            torch.mm(left.t() if p.left_transposed else left, right.t() if p.right_transposed else right, out=outs[p])

    return timer.time(step, lambda: None, seconds)["p50"]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written per second by a large `copy_`."""
    source = torch.randint(-128, 128, (COPY_BYTES if timer.gpu else 2**20,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    milliseconds = timer.time(lambda: target.copy_(source), lambda: None)["p50"]
    return 2 * source.numel() / milliseconds * 1000


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU at this moment; empty where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=" + CLOCKS, "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (subprocess.TimeoutExpired, OSError):
        return {}
    values = answer.stdout.strip().split(", ")
    names = CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if answer.returncode == 0 and len(values) == len(names) else {}


def measure(
    case: Case, build: Build, timer: Timer, dtype: torch.dtype, seconds: float, masks_known: bool
) -> dict[str, Any]:
    """One provider on one case: times, memory, then, on inputs made anew, errors."""
    figures = _times(case, build, timer, dtype, seconds)
    if case.p and not masks_known:
        return figures | {"errors": None, "errors_of": "its masks are its own: see the case without dropout"}
    shorter = case.shorter(TRUTH_FLOPS)
    rows = "all rows" if shorter == case else f"a run of {shorter.sizes['tokens']} tokens"
    return figures | {"errors": _errors(shorter, build, timer, dtype), "errors_of": rows}


def _times(case: Case, build: Build, timer: Timer, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    inputs = make_inputs(case, timer.device, dtype)
    forward = build(case, inputs)
    wanted = [inputs.tensors[n] for n in inputs.wanted]
    outputs = forward()
    loss = float(outputs[0].detach()) if outputs[0].ndim == 0 else None
    gradients = upstreams(outputs)
    del outputs
    mutable = [t.detach() for t in [*wanted, *gradients]]
    saved = [t.clone() for t in mutable]

    def restore() -> None:
        if mutable:
            torch._foreach_copy_(mutable, saved)

    def both() -> Any:
        return torch.autograd.grad(forward(), wanted, gradients)

    figures: dict[str, Any] = {"loss": loss, "forward_ms": timer.time(forward, restore, seconds)}
    step = both if wanted else forward
    figures["both_ms"] = timer.time(both, restore, seconds) if wanted else figures["forward_ms"]
    return figures | {"peak_bytes": timer.peak(step, restore)}


def _errors(case: Case, build: Build, timer: Timer, dtype: torch.dtype) -> dict[str, Any]:
    inputs = make_inputs(case, timer.device, dtype)
    inputs.keyed = True
    forward = build(case, inputs)
    with torch.no_grad():
        gradients = upstreams(_shapes(case, inputs))
    exact = truth(case, inputs, gradients)  # before the provider, which may write over its inputs
    wanted = inputs.wanted
    outputs = forward()
    values = [y.detach().clone() for y in outputs]
    gradients = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [inputs.tensors[n] for n in wanted], gradients) if wanted else ()
    return errors([*output_names(case), *(f"d {n}" for n in wanted)], [*values, *found], exact)


def _shapes(case: Case, inputs: Inputs) -> Sequence[Tensor]:
    """Tensors of the outputs' shapes; for a loss no logits are made."""
    if case.kernel == "linear_cross_entropy":
        return [torch.zeros((), dtype=torch.float32, device=inputs.tensors["hidden"].device)]
    return formula(case, inputs.tensors, inputs.extras)
