"""Which parameters full training trains and which stay as they are: patterns of names, and the last layers."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from tritune.trainer.errors import InputError
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.patterns import holds, kinds
from tritune.trainer.model.layers import decoder_layers, outermost

_SHOWN = 4  # places that are named


def mark_parts(config: FullConfig, model: PreTrainedModel, heads: list[str], unused: Collection[str]) -> None:
    """Let what the keys name train, and freeze the rest; a tensor under two names has one answer, and `freeze` the last word.

    Args:
        heads: modules that are new, and train in any case.
        unused: parameters that take no part in the loss.

    Raises:
        InputError: a pattern names nothing, or what it cannot change; the model has fewer layers; nothing trains.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    new = {n for n in named if n.startswith(tuple(f"{head}." for head in heads))}
    trains = set(named)
    if config.train or config.last_layers is not None:
        trains = _last(model, config.last_layers) if config.last_layers is not None else set()
        for pattern in config.train:
            trains |= _found("train", pattern, named, idle=unused, why="it takes no part in the loss of text alone")
    frozen: set[str] = set()
    for pattern in config.freeze:
        frozen |= _found("freeze", pattern, named, idle=new, why="it is the new head, which is random until it trains")
    ids = {id(named[n]) for n in trains} - {id(named[n]) for n in frozen - new} | {id(named[n]) for n in new}
    if not ids - {id(named[n]) for n in unused}:
        given = ", ".join(f"method.{key}={getattr(config, key)}" for key in ("train", "last_layers", "freeze"))
        raise InputError(given, "nothing is left that trains", "Name more in method.train, or less in method.freeze")
    for parameter in named.values():
        parameter.requires_grad_(id(parameter) in ids)


def _found(key: str, pattern: str, named: Collection[str], idle: Collection[str], why: str) -> set[str]:
    found = {n for n in named if holds(n, pattern)}
    if not found:
        modules = {n.rpartition(".")[0] for n in named}
        remedy = f"It has {kinds(modules)}; a whole name is {min(named)}"
        raise InputError(f"method.{key}={pattern}", "the model has no parameter and no module of this name", remedy)
    if found <= set(idle):
        raise InputError(f"method.{key}={pattern}", f"{why}: {min(found)}", "Take it out")
    return found


def _last(model: PreTrainedModel, count: int) -> set[str]:
    """The parameters of the last layers and of what stands behind them. No embedding does, and an output head that is one
    tensor with the embeddings stands in front as well."""
    layers = decoder_layers(model)
    if count > len(layers):
        remedy = f"Give at most {len(layers)}; 0 trains what stands behind the layers"
        raise InputError(f"method.last_layers={count}", f"the model has {len(layers)} layers", remedy)
    last = {id(p) for layer in layers[len(layers) - count :] for p in layer.parameters()}
    front = [*layers, *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    other = {id(p) for m in front for p in m.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {n for n, p in named if id(p) in last or id(p) not in other}


def describe_parts(model: PreTrainedModel, unused: Collection[str]) -> list[str]:
    """For the log: what stays frozen though it takes part in the loss, and tensors that have more than one name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = {n for n, p in named.items() if not p.requires_grad and n not in unused}
    if not frozen:
        return []
    names = {module: name for name, module in model.named_modules()}
    within = [names[m] for m in outermost(model, frozen)]
    places = within + sorted(n for n in frozen if not n.startswith(tuple(f"{m}." for m in within)))
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    tensors = {id(named[n]): named[n] for n in frozen}
    lines = [
        f"{sum(p.numel() for p in tensors.values()):,} parameters in {len(tensors)} tensors are frozen, without gradients and "
        f"optimizer state: {', '.join(places[:_SHOWN])}{more}"
    ]
    shared: dict[int, list[str]] = {}
    for name, parameter in named.items():
        shared.setdefault(id(parameter), []).append(name)
    for several in (n for n in shared.values() if len(n) > 1):
        what = "is frozen" if several[0] in frozen else "trains"
        lines.append(f"{' and '.join(several)} are one tensor, which {what} under all its names")
    return lines
