"""The learning rate of a run that names none: what fits its method and its model's width, or what the run began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tritune.trainer.checkpoint.names import saved_steps
from tritune.trainer.config.axes import MethodConfig
from tritune.trainer.config.schema import OptimConfig
from tritune.trainer.parallel.distributed import World
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.files import read_config

WIDTH = 2000
MOST = 5e-3


def default_rate(method: MethodConfig, width: int) -> float:
    """A peak learning rate to begin with, to two digits.

    At 2,000 features 5e-4 for LoRA and a tenth for full fine-tuning, as Schulman et al. 2025 found for Llama's family ("LoRA
    Without Regret"), who let it fall with the width to the power 0.781. That of full fine-tuning falls faster here: to the 1e-5
    that is usual at 6,000 features on one side, to what BANKING77 needs of a model of 128 on the other (benchmarks/LOG.md).
    Nothing was tried above 5e-3.

    Args:
        width: features of the hidden states.
    """
    rate, power = method.usual_rate
    return min(float(f"{rate * (WIDTH / width) ** power:.1e}"), MOST)


def settle_rate(
    optim: OptimConfig, method: MethodConfig, world: World, directory: RunDir, width: int, say: Callable[[str], None]
) -> OptimConfig:
    """The optimizer's settings with a learning rate: the one given, that of the run that goes on, or the default.

    To be called on all ranks; the directory is read on rank 0.

    Args:
        width: features of the hidden states.
    """
    if optim.lr is not None:
        return optim
    saved = world.gather(_saved_rate(directory) if world.rank == 0 else None)[0]
    rate, why = (saved, "as before") if saved else (default_rate(method, width), f"for {method.name} at this width")
    say(f"optim     learning rate {rate:g}, {why}; optim.lr sets another")
    return replace(optim, lr=rate)


def _saved_rate(directory: RunDir) -> float | None:
    if not saved_steps(directory.path / "checkpoints"):
        return None
    optim = (read_config(directory.path) or {}).get("optim")
    rate = optim.get("lr") if isinstance(optim, dict) else None
    return rate if isinstance(rate, float) else None
