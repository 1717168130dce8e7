"""Which kernels a run uses: chosen before anything is loaded, checked on the model's own shapes, put into the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from tritune.kernels.dispatch import KERNELS, Choice, announce, choose
from tritune.kernels.install import Installed, install
from tritune.kernels.selfcheck import self_check, sizes_of
from tritune.trainer.config.choices import Dtype
from tritune.trainer.config.schema import KernelsConfig
from tritune.trainer.errors import InputError
from tritune.trainer.model.layers import idle_modules
from tritune.trainer.parallel.distributed import World


def choose_kernels(kernels: KernelsConfig, dtype: Dtype, device: torch.device, compiled: bool) -> dict[str, Choice]:
    """Return what computes each kernel.

    Args:
        dtype: of the model's computations.
        compiled: torch.compile compiles the layers.

    Raises:
        InputError: Triton is asked for where it cannot run.
    """
    overrides = {kernel: getattr(kernels, kernel).value for kernel in KERNELS}
    try:
        return choose(kernels.name, overrides, device, getattr(torch, dtype.value), compiled)
    except ValueError as error:
        key, _, rest = str(error).partition(": ")
        rule, _, remedy = rest.partition(". ")
        raise InputError(key, rule, remedy) from None


def install_kernels(
    model: PreTrainedModel,
    choices: dict[str, Choice],
    checked_in: Dtype | None,
    world: World,
    say: Callable[[str], None],
) -> Installed:
    """Check the chosen kernels, put those that pass on every rank into `model`, and announce all of it.

    Args:
        checked_in: the dtype in which each is compared with its reference; None trusts them unchecked.
    """
    idle = idle_modules(model)
    if checked_in is not None and any(c.implementation == "triton" for c in choices.values()):
        dtype = getattr(torch, checked_in.value)
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
