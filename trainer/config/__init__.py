"""The configuration: its keys (`schema.py` and what it imports), the rules they keep, and how overrides become a `Config`.

`objective` and `method` are axes: each option is a file of its own (`axes.py`, `registry.py`).
"""

from tritune.trainer.config.axes import MethodConfig, ObjectiveConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.config.schema import (
    IDENTITY,
    SPLITS,
    Config,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
    VerifyConfig,
)

__all__ = [
    "IDENTITY",
    "SPLITS",
    "BackendConfig",
    "Config",
    "GenerateConfig",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "TrackingConfig",
    "TrainConfig",
    "VerifyConfig",
]
