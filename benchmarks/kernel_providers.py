"""Who computes the cases: PyTorch, our kernels, and other people's, each an optional install that is skipped by name.

A builder takes a case and its inputs and returns the forward to be timed. Peers are called through their public functions,
with their defaults: also where these write over inputs, which is why the timer puts inputs back. Nothing is copied from
them. `PYTHONPATH=/folder python benchmarks/kernels.py` takes peers from a folder that `pip install --no-deps --target` filled.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from kernel_cases import EPS, LINEARS, SCALING, Case, Inputs, formula, linear_sizes
from torch import Tensor, nn
from tritune.kernels.language import INTERPRETED
from tritune.kernels.linear_cross_entropy import linear_cross_entropy
from tritune.kernels.lora import Projection, lora_linear, lora_mlp
from tritune.kernels.rms_norm import add_rms_norm, rms_norm
from tritune.kernels.rope import rope
from tritune.kernels.swiglu import geglu, swiglu

Forward = Callable[[], tuple[Tensor, ...]]
Builder = Callable[[Case, Inputs], Forward]


class Skip(Exception):
    """A provider does not run on a case; the text says why."""


@dataclass(frozen=True)
class Provider:
    """One column of other people's work, or of ours.

    Attributes:
        title: for the tables.
        builders: by kernel.
        package: the distribution whose version the record gives.
        masks_known: whether it can drop by the tokens' keys, so that dropout has a truth.
        lacks: why it has no builder for a kernel that it might be expected to have.
        weight: its share of the time, relative to the others.
    """

    title: str
    builders: dict[str, Builder]
    package: str | None = None
    masks_known: bool = False
    lacks: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0


def take(module: str) -> Any:
    """Import a peer's module.

    Raises:
        Skip: it is absent, or its import fails; with the reason.
    """
    top = module.partition(".")[0]
    try:
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            raise Skip(f"{top} is not installed")
        return importlib.import_module(module)
    except Skip:
        raise
    except Exception as error:  # a peer may raise anything on a machine that it does not know
        raise Skip(f"import {module} raised {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def eager(case: Case, inputs: Inputs) -> Forward:
    return lambda: formula(case, inputs.tensors, inputs.extras, inputs.keyed)


def compiled(case: Case, inputs: Inputs) -> Forward:
    torch._dynamo.reset()
    backend = "eager" if INTERPRETED else "inductor"  # a smoke run does not wait for a C++ compiler
    function = torch.compile(partial(formula, case), dynamic=False, backend=backend)
    return lambda: function(inputs.tensors, inputs.extras, inputs.keyed)


def no_adapters(case: Case, inputs: Inputs) -> Forward:
    for name in LINEARS:
        del inputs.tensors["a_" + name], inputs.tensors["b_" + name]
    return eager(case, inputs)


def our_head(share: int, case: Case, inputs: Inputs) -> Forward:
    """`share`: of the tokens that are one chunk; 1 leaves the choice to the kernel."""
    t, num_tokens = inputs.tensors, case.sizes["tokens"]
    chunk = None if share == 1 else min(2048, num_tokens // share)
    given: dict[str, Any] = {"num_kept": case.kept} if case.ignored else {}  # as a collator knows it

    def forward() -> tuple[Tensor, ...]:
        loss, _ = linear_cross_entropy(
            t["hidden"], t["weight"], t["targets"], reduction="sum", chunk_tokens=chunk, **given
        )
        return (loss / case.kept,)

    return forward


def our_layer(case: Case, inputs: Inputs) -> Forward:
    t, keys = inputs.tensors, inputs.extras["keys"]
    of = {n: Projection(t["w_" + n], None, t["a_" + n], t["b_" + n], SCALING, i) for i, n in enumerate(LINEARS)}

    def forward() -> tuple[Tensor, ...]:
        q, k, v = lora_linear(t["x"], [of["q"], of["k"], of["v"]], keys, case.p)
        (o,) = lora_linear(t["attended"], [of["o"]], keys, case.p)
        return q, k, v, o, lora_mlp(t["normed"], [of["gate"], of["up"]], of["down"], "silu", keys, case.p)

    return forward


def _rotation(function: Callable[..., Any], inputs: Inputs) -> Forward:
    t = inputs.tensors
    return lambda: tuple(function(t["q"].transpose(1, 2), t["k"].transpose(1, 2), t["cos"], t["sin"]))


def _pair(function: Callable[[Tensor, Tensor], Tensor], case: Case, inputs: Inputs) -> Forward:
    return lambda: (function(inputs.tensors["gate"], inputs.tensors["up"]),)


OURS: dict[str, Builder] = {
    "linear_cross_entropy": partial(our_head, 1),
    "lora": our_layer,
    "rms_norm": lambda case, inputs: lambda: (rms_norm(inputs.tensors["x"], inputs.tensors["weight"], EPS),),
    "add_rms_norm": lambda case, inputs: (
        lambda: add_rms_norm(inputs.tensors["x"], inputs.tensors["residual"], inputs.tensors["weight"], EPS)
    ),
    "rope": lambda case, inputs: _rotation(rope, inputs),
    "swiglu": partial(_pair, swiglu),
    "geglu": partial(_pair, geglu),
    "nf4": lambda case, inputs: lambda: (inputs.extras["weight"].dequantize(inputs.extras["dtype"]),),
}


def _liger() -> Any:
    return take("liger_kernel.transformers.functional")


def liger_head(wide: bool, case: Case, inputs: Inputs) -> Forward:
    function, t = _liger().liger_fused_linear_cross_entropy, inputs.tensors
    if wide and "accum_dtype" not in inspect.signature(function).parameters:
        raise Skip("this version of liger-kernel has no accum_dtype")
    if wide and not case.trains:
        raise Skip("accum_dtype is of the head's gradient, and this head is frozen")
    options = {"accum_dtype": torch.float32} if wide else {}
    return lambda: (function(t["hidden"], t["weight"], t["targets"], **options),)


def liger_norm(case: Case, inputs: Inputs) -> Forward:
    functions, t = _liger(), inputs.tensors
    if case.kernel == "rms_norm":
        return lambda: (functions.liger_rms_norm(t["x"], t["weight"], EPS),)
    return lambda: tuple(functions.liger_fused_add_rms_norm(t["x"], t["residual"], t["weight"], EPS))


LIGER: dict[str, Builder] = {
    "linear_cross_entropy": partial(liger_head, False), "rms_norm": liger_norm, "add_rms_norm": liger_norm,
    "rope": lambda case, inputs: _rotation(_liger().liger_rope, inputs),
    "swiglu": lambda case, inputs: _pair(_liger().liger_swiglu, case, inputs),
    "geglu": lambda case, inputs: _pair(_liger().liger_geglu, case, inputs),
}  # fmt: skip


def cce_head(case: Case, inputs: Inputs) -> Forward:
    function, t = take("cut_cross_entropy").linear_cross_entropy, inputs.tensors
    return lambda: (function(t["hidden"], t["weight"], t["targets"], impl="cce"),)


def torch_head(case: Case, inputs: Inputs) -> Forward:
    function, t = getattr(torch.nn.functional, "linear_cross_entropy", None), inputs.tensors
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Skip(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return lambda: (function(t["hidden"], t["weight"], t["targets"], options=options()),)


def adapted_layer(case: Case, inputs: Inputs) -> Any:
    """The decoder layer's linears as PEFT's own modules over the case's tensors."""
    peft, t, layer = take("peft"), inputs.tensors, nn.Module()
    for name, (n, k) in linear_sizes(case).items():
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = t["w_" + name]
        setattr(layer, f"{name}_proj", linear)
    config = peft.LoraConfig(
        r=case.sizes["rank"], lora_alpha=SCALING * case.sizes["rank"], lora_dropout=case.p,
        target_modules=[f"{name}_proj" for name in LINEARS],
    )  # fmt: skip
    layer = peft.inject_adapter_in_model(config, layer)
    for name in LINEARS:
        module = getattr(layer, f"{name}_proj")
        module.lora_A["default"].weight, module.lora_B["default"].weight = t["a_" + name], t["b_" + name]
    layer.act_fn = nn.SiLU()
    return layer.train()


def peft_layer(narrow: bool, case: Case, inputs: Inputs) -> Forward:
    """`narrow`: adapters in the base's dtype; else PEFT's default, float32, under autocast as trainers run it."""
    t = inputs.tensors
    dtype = t["x"].dtype
    if narrow:
        for name in (n for n in list(t) if n[:2] in ("a_", "b_")):
            t[name] = nn.Parameter(t[name].detach().to(dtype))
    layer = adapted_layer(case, inputs)

    def forward() -> tuple[Tensor, ...]:
        with torch.autocast(t["x"].device.type, dtype, enabled=not narrow and dtype != torch.float32):
            x, normed = t["x"], t["normed"]
            hidden = layer.act_fn(layer.gate_proj(normed)) * layer.up_proj(normed)
            return (
                layer.q_proj(x), layer.k_proj(x), layer.v_proj(x), layer.o_proj(t["attended"]), layer.down_proj(hidden),
            )  # fmt: skip

    return forward


def _unsloth(name: str) -> Any:
    """One of Unsloth's kernel modules; its package wants unsloth_zoo and patches much at import, its kernels need neither."""
    spec = None if "unsloth" in sys.modules else importlib.util.find_spec("unsloth")
    if "unsloth" not in sys.modules:
        if spec is None or not spec.submodule_search_locations:
            raise Skip("unsloth is not installed")
        from packaging.version import Version

        root = spec.submodule_search_locations[0]
        if not torch.cuda.is_available():
            os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
        stubs: dict[str, dict[str, Any]] = {
            "unsloth": {"__path__": [root]},
            "unsloth.kernels": {"__path__": [os.path.join(root, "kernels")]},
            "unsloth_zoo": {"__path__": []},
            "unsloth_zoo.utils": {"Version": lambda text: Version(str(text))},
            "unsloth_zoo.log": {"logger": logging.getLogger("unsloth")},
            "unsloth_zoo.temporary_patches": {"__path__": []},
            "unsloth_zoo.temporary_patches.common": {"torch_compile": lambda f=None, **_: f or (lambda g: g)},
        }
        for module, names in stubs.items():
            stub = types.ModuleType(module)
            vars(stub).update(names)
            sys.modules[module] = stub
    return take(f"unsloth.kernels.{name}")


def unsloth_norm(case: Case, inputs: Inputs) -> Forward:
    function, t = _unsloth("rms_layernorm").fast_rms_layernorm, inputs.tensors
    norm = types.SimpleNamespace(weight=t["weight"], variance_epsilon=EPS)
    return lambda: (function(norm, t["x"]),)


def unsloth_layer(case: Case, inputs: Inputs) -> Forward:
    functions = _unsloth("fast_lora")
    layer, t = adapted_layer(case, inputs), inputs.tensors

    def forward() -> tuple[Tensor, ...]:
        q, k, v = functions.apply_lora_qkv(layer, t["x"][None])
        o = functions.apply_lora_o(layer, t["attended"][None])
        outputs = q, k, v, o, functions.apply_lora_mlp_swiglu(layer, t["normed"][None])
        return tuple(y[0] for y in outputs)

    return forward


UNSLOTH: dict[str, Builder] = {
    "lora": unsloth_layer, "rms_norm": unsloth_norm,
    "rope": lambda case, inputs: _rotation(_unsloth("rope_embedding").fast_rope_embedding, inputs),
}  # fmt: skip


def bitsandbytes_weight(case: Case, inputs: Inputs) -> Forward:
    """Its kernel on our codes: the formats are one, so the values must be."""
    functions = take("bitsandbytes.functional")
    entries = inputs.extras["weight"].to_state_dict("weight", inputs.extras["dtype"])
    packed = entries.pop("weight")
    state = functions.QuantState.from_dict(entries, packed.device)
    return lambda: (functions.dequantize_4bit(packed, state),)


ALL: tuple[str, ...] = tuple(OURS)
PROVIDERS: dict[str, Provider] = {  # in this order: what compiles longest takes the time that the others leave
    "eager": Provider("PyTorch eager", dict.fromkeys(ALL, eager), "torch", masks_known=True, weight=1.5),
    "ours": Provider("ours", OURS, masks_known=True, weight=1.5),
    "liger": Provider("Liger", LIGER, "liger-kernel"),
    "unsloth": Provider(
        "Unsloth", UNSLOTH, "unsloth",
        lacks={"linear_cross_entropy": "it is in unsloth_zoo (AGPL), not in this wheel",
               "swiglu": "without backward of its own: measured as part of `lora`",
               "geglu": "without backward of its own", "add_rms_norm": "AGPL, not called here"},
    ),
    "ours-chunks": Provider("ours, chunks of M / 4 or 2,048", {"linear_cross_entropy": partial(our_head, 4)}),
    "liger-fp32": Provider("Liger, accum_dtype=float32", {"linear_cross_entropy": partial(liger_head, True)}, "liger-kernel"),
    "cce": Provider("CCE", {"linear_cross_entropy": cce_head}, "cut-cross-entropy"),
    "torch": Provider("F.linear_cross_entropy, chunked", {"linear_cross_entropy": torch_head}, "torch"),
    "peft": Provider("PEFT, float32 adapters, autocast", {"lora": partial(peft_layer, False)}, "peft"),
    "peft-narrow": Provider("PEFT, adapters in bf16", {"lora": partial(peft_layer, True)}, "peft"),
    "no-adapters": Provider("PyTorch eager without adapters", {"lora": no_adapters}, "torch", masks_known=True),
    "bitsandbytes": Provider("bitsandbytes", {"nf4": bitsandbytes_weight}, "bitsandbytes"),
    "compile": Provider("torch.compile", dict.fromkeys(ALL, compiled), "torch", masks_known=True, weight=2.5),
}  # fmt: skip
