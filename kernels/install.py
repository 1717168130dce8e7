"""Put the chosen kernels into one model instance, and take them out again. No class and no library is changed.

A block gets a `forward` of its own as an instance attribute; parameters, names, hooks and state dict stay. Families that
`families.FAMILIES` does not know get what can be told to fit by its values: norms, the output head and adapted layers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from tritune.kernels.cross_entropy import LossOptions
from tritune.kernels.dispatch import Choice
from tritune.kernels.families import (
    FAMILIES,
    activation_of,
    attention_forward,
    attention_inputs,
    fusable,
    head_forward,
    is_adapted,
    layer_forward,
    lora_forward,
    mlp_forward,
    mlp_inputs,
    norm_forward,
    unread,
)
from tritune.kernels.rms_norm import rms_norm_reference


@dataclass
class Installed:
    """What `install` did.

    Attributes:
        modules: whose forward is ours now.
        blocks: those among them that compute some of their children themselves; their `computes` lists these, whose
            own hooks never run, for whoever gathers parameters in hooks.
        head: whether the output head takes targets and returns losses.
        counts: blocks by kernel.
        left: what stayed as it was, and why, though its kernel was chosen.
    """

    modules: list[nn.Module] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    head: bool = False
    counts: Counter = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log."""
        done = ", ".join(f"{name} x {count}" for name, count in self.counts.items())
        return ([f"in place: {done}"] if done else []) + [f"left to the model's own code: {line}" for line in self.left]


def install(model: nn.Module, choices: Mapping[str, Choice], idle: Collection[nn.Module] = ()) -> Installed:
    """Give blocks of `model`, a transformers model, the kernels that `choices` says are Triton's.

    To be called after adapters are in place and before anything wraps the model. Meta parameters are fine.

    Args:
        idle: modules that never run, and stay as they are with all that is in them.
    """
    on = {kernel for kernel, choice in choices.items() if choice.implementation == "triton"}
    done = Installed()
    if not on:
        return done
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    family = FAMILIES.get(config.model_type)
    if family is None and on & {"rope", "glu"}:
        known = ", ".join(FAMILIES)
        done.left.append(f"rotation and MLP of {config.model_type}, a family not known here (known: {known})")
    modules = [m for _, m in model.named_modules(memo=set(idle))]
    norms = _install_norms(modules, done) if "rms_norm" in on else set()
    if family is not None:
        for module in modules:
            if hasattr(module, "o_proj") and hasattr(module, "head_dim"):
                inputs = attention_inputs(module)
                fused = "lora" in on and fusable(inputs)
                if (fused or "rope" in on) and (names := unread(module)):
                    line = f"{type(module).__name__}, whose forward takes {', '.join(names)}, unknown here"
                    done.left += [line] if line not in done.left else []
                elif fused or "rope" in on:
                    forward = partial(attention_forward, family, "rope" in on, fused)
                    _patch(done, module, forward, inputs if fused else ())
                    done.counts["rope"] += "rope" in on
                    done.counts["lora group"] += fused
            elif hasattr(module, "down_proj"):
                _install_mlp(module, on, done)
            elif family.adds_before_norm and getattr(module, "post_attention_layernorm", None) in norms:
                _patch(done, module, layer_forward)
    if "lora" in on:
        grouped = {layer for block in done.blocks for layer in block.computes}  # type: ignore[union-attr]
        for module in modules:
            if is_adapted(module) and module not in grouped:
                _patch(done, module, lora_forward, [module.base_layer])  # type: ignore[list-item]
                done.counts["lora layer"] += 1
        done.left += _not_fused(modules)
    if "linear_cross_entropy" in on:
        _install_head(model, config, done)
    done.counts = +done.counts
    return done


def uninstall(done: Installed) -> None:
    """Give every block its class's forward back."""
    for module in done.modules:
        vars(module).pop("forward", None)
        vars(module).pop("computes", None)
    done.modules, done.blocks, done.head, done.counts = [], [], False, Counter()


def _not_fused(modules: list[nn.Module]) -> list[str]:
    """Layers with a low-rank update that no kernel computes, by kind: they have another base, or do more than update it."""
    kinds = Counter(
        f"{type(module).__name__} on {type(module.base_layer).__name__}"
        for module in modules
        if hasattr(module, "lora_A") and not is_adapted(module)
    )
    return [f"{count} x {kind}, which no kernel computes" for kind, count in kinds.items()]


def _patch(
    done: Installed, module: nn.Module, function: Callable[..., Any], computes: Sequence[nn.Module] = ()
) -> None:
    module.forward = MethodType(function, module)  # type: ignore[assignment]
    done.modules.append(module)
    if computes:
        module.computes = list(computes)  # type: ignore[assignment]
        done.blocks.append(module)


def _install_norms(modules: list[nn.Module], done: Installed) -> set[nn.Module]:
    offsets: dict[type, float | None] = {}
    norms = set()
    for module in modules:
        if not type(module).__name__.endswith("RMSNorm") or [n for n, _ in module.named_parameters()] != ["weight"]:
            continue
        if type(module) not in offsets:
            offsets[type(module)] = _norm_offset(module)
            if offsets[type(module)] is None:
                done.left.append(f"{type(module).__name__}, which computes something else")
        offset = offsets[type(module)]
        if offset is not None:
            _patch(done, module, partial(norm_forward, _eps(module), offset))
            done.counts["rms_norm"] += 1
            norms.add(module)
    return norms


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


@torch.no_grad()
def _norm_offset(module: nn.Module) -> float | None:
    """The offset with which `rms_norm` gives what the module gives, by its values; None: there is none."""
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    weight = next(twin.parameters())
    weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    x = torch.randn(4, weight.numel(), generator=generator)
    for offset in (0.0, 1.0):
        if torch.allclose(twin(x), rms_norm_reference(x, weight, _eps(module), offset), rtol=1e-5, atol=1e-6):
            return offset
    return None


def _install_mlp(module: Any, on: set[str], done: Installed) -> None:
    activation = activation_of(module)
    if activation is None:
        done.left.append(f"{type(module).__name__}: its activation is neither SiLU nor GELU by tanh")
        return
    layers = [*mlp_inputs(module), module.down_proj]
    fused = "lora" in on and fusable(layers)
    if fused or "glu" in on:
        _patch(done, module, partial(mlp_forward, activation, fused), layers if fused else ())
        done.counts["lora mlp" if fused else "glu"] += 1


def _install_head(model: Any, config: Any, done: Installed) -> None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        what = "there is none" if head is None else f"it is a {type(head).__name__}"
        done.left.append(f"the output head ({what}): logits are made in chunks")
        return
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    options = LossOptions(softcap=getattr(config, "final_logit_softcapping", None), scale=scale)
    _patch(done, head, partial(head_forward, options))
    done.head = True
    done.counts["linear_cross_entropy"] += 1
