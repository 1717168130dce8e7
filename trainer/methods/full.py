"""`method=full`: every parameter trains."""

from __future__ import annotations

from dataclasses import dataclass

from tritune.trainer.config.axes import MethodConfig


@dataclass
class FullConfig(MethodConfig):
    name: str = "full"
