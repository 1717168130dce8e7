"""Which parameters the loss of text depends on. The others, a vision tower's say, stay as they are on every backend.

Left to themselves they would differ: DDP waits for a gradient that never comes, ZeRO decays them by the weight decay of a
zero gradient, and FSDP leaves them alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from tritune.trainer.batch import rows_of
from tritune.trainer.config import MethodConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.layers import idle_modules, set_apart
from tritune.trainer.model.scorer import TESTED_FAMILIES, TokenScorer

_SHOWN = 4


def reaches_everything(config: PreTrainedConfig) -> bool:
    """Whether a test has shown that every parameter of such a model takes part, so that none need be looked for."""
    return config.model_type in TESTED_FAMILIES and not getattr(config, "add_cross_attention", False)


def find_unused(model: PreTrainedModel, heads: list[str]) -> frozenset[str]:
    """Return the names of the parameters that take no part in the loss, and set apart the modules that hold no other.

    A shared parameter has all its names. To be called on a model that is whole and before a method is applied: the loss of a
    few tokens is computed, and its graph followed back to the parameters. No gradient is.

    Args:
        heads: modules that are new (a classification head); with one, the loss is a classifier's.

    Raises:
        InputError: text alone does not pass through this model.
    """
    if reaches_everything(model.config):
        return frozenset()
    kept = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    try:
        for parameter, _ in kept:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            reached = _leaves(_loss(model, heads))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        remedy = f"Families known to work: {', '.join(TESTED_FAMILIES)}"
        rule = f"text alone does not pass through it ({reason(error)})"
        raise InputError(f"model_type {model.config.model_type}", rule, remedy) from error
    finally:
        model.train(training)
        for parameter, required in kept:
            parameter.requires_grad_(required)
    unused = frozenset(
        n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in reached and p.is_floating_point()
    )
    set_apart(model, unused)
    return unused


def describe_unused(model: PreTrainedModel, unused: frozenset[str], method: MethodConfig) -> list[str]:
    """For the log: how many they are and what holds them, and which adapters they would have had."""
    lines = _router_line(model)
    if not unused:
        return lines
    tensors = {id(p): p for n, p in model.named_parameters() if n in unused}
    names = {module: name for name, module in model.named_modules()}
    idle = [names[module] for module in idle_modules(model)]
    places = idle + sorted(n for n in unused if not any(n.startswith(f"{module}.") for module in idle))
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    lines += [
        f"{sum(p.numel() for p in tensors.values()):,} parameters in {len(tensors)} tensors take no part in the loss of text "
        f"and stay as they are: {', '.join(places[:_SHOWN])}{more}"
    ]
    layers = method.idle_layers(model, unused)
    if layers:
        lines.append(f"{len(layers)} linear layers among them match method.targets and get no adapter, as {layers[0]}")
    return lines


def _router_line(model: PreTrainedModel) -> list[str]:
    """Of a mixture of experts: that the loss is of the tokens alone."""
    factor = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if not factor:
        return []
    return [f"the routers' balancing loss (router_aux_loss_coef={factor:g}) is not added to that of the tokens"]


def _loss(model: PreTrainedModel, heads: list[str]) -> Tensor:
    ids = torch.arange(8) * 7 % model.config.get_text_config().vocab_size
    scorer = TokenScorer(model, None, 0, len(ids)).eval()
    return scorer(rows_of(ids[None]), "class_logits" if heads else "token_nll").sum()


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the parameters from which `loss` was computed."""
    found: set[int] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad node, where a gradient would arrive
        if leaf is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found
