"""Options of an axis by name, with their defaults."""

from tritune.trainer.config.axes import ObjectiveConfig
from tritune.trainer.config.registry import axis_options


def learning(name: str) -> ObjectiveConfig:
    return axis_options("objective")[name]()
