"""Which kernels a run uses: chosen before anything is loaded, checked on the model's own shapes, put into the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from tritune.kernels.dispatch import KERNELS, Choice, announce, choose
from tritune.kernels.install import Installed, install
from tritune.kernels.selfcheck import self_check, sizes_of
from tritune.trainer.config import Config
from tritune.trainer.errors import InputError
from tritune.trainer.model.layers import idle_modules
from tritune.trainer.parallel.distributed import World


def choose_kernels(config: Config, device: torch.device) -> dict[str, Choice]:
    """Return what computes each kernel.

    Raises:
        InputError: Triton is asked for where it cannot run.
    """
    overrides = {kernel: getattr(config.kernels, kernel).value for kernel in KERNELS}
    try:
        return choose(
            config.kernels.name, overrides, device, getattr(torch, config.model.dtype.value), config.train.compile
        )
    except ValueError as error:
        key, _, rest = str(error).partition(": ")
        rule, _, remedy = rest.partition(". ")
        raise InputError(key, rule, remedy) from None


def install_kernels(
    config: Config, model: PreTrainedModel, choices: dict[str, Choice], world: World, say: Callable[[str], None]
) -> Installed:
    """Check the chosen kernels, put those that pass on every rank into `model`, and announce all of it."""
    idle = idle_modules(model)
    if config.kernels.self_check and any(c.implementation == "triton" for c in choices.values()):
        dtype = getattr(torch, config.model.dtype.value)
        choices = _agreed(self_check(choices, sizes_of(model, idle), world.device, dtype), world)
    installed = install(model, choices, idle)
    for line in announce(choices) + installed.lines():
        say(f"kernels   {line}")
    return installed


def _agreed(choices: dict[str, Choice], world: World) -> dict[str, Choice]:
    """One rank's fallback is everyone's: ranks run the same code."""
    for other in world.gather({n: (c.implementation, c.reason) for n, c in choices.items()}):
        for name, (implementation, reason) in other.items():
            if implementation == "reference":
                choices[name] = replace(choices[name], implementation=implementation, reason=reason)
    return choices
