"""Which layers LoRA takes and which modules train whole, by the patterns of `method.targets` and its like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tritune.trainer.errors import InputError
from tritune.trainer.methods import patterns
from tritune.trainer.methods.linear import LINEAR
from tritune.trainer.methods.lora import REGEX, LoraConfig

ALL_LINEAR = "all-linear"


def linear_layers(model: nn.Module, heads: Collection[str] = ()) -> dict[str, nn.Linear | Conv1D]:
    """What an update can go on, by name, but `heads`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LINEAR) and n not in heads}


def target_names(
    config: LoraConfig, model: PreTrainedModel, heads: Collection[str], unused: Collection[str] = ()
) -> list[str]:
    """Names of the linear layers to adapt, in the model's order; before any is adapted.

    `all-linear` means every one but the output head; other entries are a name's end (`q_proj`, `mlp.up_proj`), a glob, or
    `re:` and a regular expression for the whole name. Layers whose weight is `unused` are none of them.

    Raises:
        InputError: an entry that matches nothing, or nothing that takes part in the loss; no layer is left.
    """
    linears, head = linear_layers(model, heads), model.get_output_embeddings()
    output = {n for n, m in linears.items() if m is head}
    idle = {n for n in linears if f"{n}.weight" in unused}
    chosen: set[str] = set()
    for pattern in config.targets:
        found = {n for n in linears if (pattern == ALL_LINEAR and n not in output) or matches(n, pattern)}
        if not found:
            raise _no_target(pattern, model, _last_names(linears))
        if found <= idle:
            rule = f"it names layers that take no part in the loss of text alone: {len(found)}, as {min(found)}"
            kinds = _last_names(n for n in linears if n not in idle | output)
            raise InputError(f"method.targets={pattern}", rule, f"Take it out; these take part: {', '.join(kinds)}")
        chosen |= found - idle
    chosen = {n for n in chosen if not any(matches(n, e) for e in config.exclude)}
    if not chosen:
        raise InputError(f"method.exclude={config.exclude}", "no layer is left to adapt", "Exclude less")
    return [n for n in linears if n in chosen]


def _no_target(pattern: str, model: nn.Module, kinds: list[str]) -> InputError:
    fused = [n for n in fused_experts(model) if matches(n, pattern) or matches(n.rpartition(".")[0], pattern)]
    if fused:
        owner = fused[0].rpartition(".")[0].rpartition(".")[2]
        rule = f"{fused[0]} holds the matrices of all experts in one parameter, which method=lora does not adapt"
        remedy = f"Take it out; method.modules_to_save=[{owner}] trains the experts whole"
        return InputError(f"method.targets={pattern}", rule, remedy)
    remedy = f"The model has {', '.join(kinds)}" if kinds else "It has none at all: use method=full"
    return InputError(f"method.targets={pattern}", "no linear layer has this name", remedy)


def unused_targets(config: LoraConfig, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
    """Layers that the targets name and that get no update, since they take no part in the loss; before `add_lora`."""
    idle = [n for n in linear_layers(model) if f"{n}.weight" in unused]
    named = [n for n in idle if any(t == ALL_LINEAR or matches(n, t) for t in config.targets)]
    return [n for n in named if not any(matches(n, e) for e in config.exclude)]


def saved_modules(
    config: LoraConfig, model: PreTrainedModel, heads: list[str], unused: Collection[str] = ()
) -> list[str]:
    """Full names of the modules that train whole: `modules_to_save` and the new heads; none that is `unused` altogether."""
    names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    result = list(heads)
    for pattern in config.modules_to_save:
        found = [n for n in names if matches(n, pattern)]
        if not found:
            remedy = f"It has {', '.join(n for n in names if '.' not in n)} and what lies in them"
            raise InputError(f"method.modules_to_save={pattern}", "the model has no module of this name", remedy)
        found, idle = [n for n in found if not _is_idle(model, n, unused)], found
        if not found:
            rule = f"it takes no part in the loss of text alone: {idle[0]}"
            raise InputError(
                f"method.modules_to_save={pattern}", rule, "Take it out: it stays as the base model has it"
            )
        result += [n for n in found if n not in result]
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and getattr(output, "weight", None) is embeddings.weight:
        both = [n for n, m in model.named_modules() if m is embeddings or m is output]
        if set(both) & set(result):  # one tensor under two names: whoever loads only one of them unties it
            result += [n for n in both if n not in result]
    return result


def _is_idle(model: nn.Module, name: str, unused: Collection[str]) -> bool:
    parameters = model.get_submodule(name).named_parameters(remove_duplicate=False)
    return all(f"{name}.{key}" in unused for key, _ in parameters)


def matches(name: str, pattern: str) -> bool:
    """Whether a layer or a module is one that `pattern` means."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    return patterns.matches(name, pattern)


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of three dimensions: transformers keeps the matrices of all experts of a layer in one."""
    return {n: p for n, p in model.named_parameters() if p.ndim == 3}


def describe_targets(
    title: str, config: LoraConfig, model: PreTrainedModel, adapted: Collection[str], unused: Collection[str]
) -> list[str]:
    """For the log: the adapted layers by their last names; what `all-linear` leaves frozen, since no linear layer holds it.

    Args:
        title: what adapts them.
        adapted: their names.
        unused: parameters that are said elsewhere.
    """
    kinds = Counter(n.rpartition(".")[2] for n in adapted)
    lines = [f"{title} adapts {len(adapted)} linear layers: {', '.join(f'{n} x {c}' for n, c in kinds.items())}"]
    if ALL_LINEAR not in config.targets:
        return lines
    held = {id(p) for m in model.modules() if isinstance(m, (*LINEAR, nn.Embedding)) for p in m.parameters()}
    left = {
        n: p for n, p in model.named_parameters()
        if p.ndim >= 2 and id(p) not in held and not p.requires_grad and n not in unused
    }  # fmt: skip
    if left:
        shapes = Counter((re.sub(r"\.\d+\.", ".*.", n), tuple(p.shape)) for n, p in left.items())
        said = ", ".join(f"{name} {list(shape)} x {count}" for (name, shape), count in shapes.items())
        size = sum(p.numel() for p in left.values())
        owners = dict.fromkeys(n.rpartition(".")[0].rpartition(".")[2] for n in left)
        lines.append(f"{size:,} parameters stay frozen, since no linear layer holds them: {said}")
        lines.append(f"method.modules_to_save=[{','.join(owners)}] would train them whole")
    return lines


def _last_names(names: Iterable[str]) -> list[str]:
    return sorted({n.rpartition(".")[2] for n in names})
