"""AdamW with groups, and the learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from tritune.trainer.config import OptimConfig
from tritune.trainer.config.choices import Schedule


def make_optimizer(
    config: OptimConfig, model: nn.Module, rate_factor: Callable[[str, Sequence[int]], float] = lambda name, shape: 1.0
) -> Optimizer:
    """AdamW over what trains; biases, norms and embeddings (also a head tied to one) do not decay.

    Args:
        rate_factor: name and shape of a parameter -> by what its rate is multiplied. Each group keeps its own as `factor`, for
            whoever sets its rate; there is one pair of groups a factor, in the model's order.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}  # (factor, whether they decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 keeps a partitioned parameter flat and empty.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            factor, decays = rate_factor(name, shape), len(shape) >= 2 and id(parameter) not in embeddings
            for kind in (True, False):  # what decays comes first
                groups.setdefault((factor, kind), [])
            groups[factor, decays].append(parameter)
    made = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "factor": factor}
        for (factor, decays), parameters in groups.items()
        if parameters
    ]
    fused = all(
        p.device.type in ("cuda", "cpu") and torch.is_floating_point(p) for found in groups.values() for p in found
    )
    return AdamW(made, lr=peak_rate(config), betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused)


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Let the groups of `make_optimizer` learn at `lr`, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def make_state(optimizer: Optimizer) -> None:
    """Let a fresh optimizer make its state: a step with zero gradients and lr 0 changes no parameter.

    Made at once, so that memory is taken before the dry run and a checkpoint never depends on what had gradients.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear and its first step is not zero. Then: constant; linear or cosine (Loshchilov and Hutter 2016) down
    to `min_lr_ratio`; or wsd, warm-up-stable-decay (Hu et al. 2024, MiniCPM): constant, then linear over the last
    `decay_ratio` of all steps.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak_rate(config) * (step + 1) / (warmup + 1)
    floor = config.min_lr_ratio
    done = (step - warmup) / max(total_steps - warmup, 1)
    if config.schedule is Schedule.linear:
        factor = 1.0 - (1.0 - floor) * done
    elif config.schedule is Schedule.cosine:
        factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.schedule is Schedule.wsd:
        decay = max(math.ceil(config.decay_ratio * total_steps), 1)
        into = step - (total_steps - decay)
        factor = 1.0 if into < 0 else 1.0 - (1.0 - floor) * into / decay
    else:
        factor = 1.0
    return peak_rate(config) * factor


def peak_rate(config: OptimConfig) -> float:
    """The rate that was given, or that `rate.with_rate` put in its place."""
    assert config.lr is not None
    return config.lr
