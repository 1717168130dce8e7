"""The configuration: its keys (`schema.py` and what it imports), the rules they keep, and how overrides become a `Config`."""

from tritune.trainer.config.schema import (
    IDENTITY,
    NAMES,
    SCHEMAS,
    SPLITS,
    ClassifyTokenConfig,
    Config,
    GenerateConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
    VerifyConfig,
)

__all__ = [
    "IDENTITY",
    "NAMES",
    "SCHEMAS",
    "SPLITS",
    "ClassifyTokenConfig",
    "Config",
    "GenerateConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "TrackingConfig",
    "TrainConfig",
    "VerifyConfig",
]
