"""The rules of the keys that say which model it is and how it is kept."""

from __future__ import annotations

from tritune.trainer.config.axes import Rule
from tritune.trainer.config.choices import AdapterMode, Storage
from tritune.trainer.config.registry import axis_options
from tritune.trainer.config.schema import Config


def check_model(c: Config, rule: Rule, training: bool) -> None:
    """Args as of `check.unheld_rules`."""
    rule(
        bool(c.model.path) != bool(c.model.config),
        "model.path",
        "a model is either pretrained or made from a config. Give model.path=<hub id or folder>, or model=tiny",
    )
    rule(
        not c.model.config or c.model.tokenizer is not None,
        "model.tokenizer",
        "a model from a config has no tokenizer of its own. Give model.tokenizer=<folder>, or bytes (built in)",
    )
    rule(
        c.model.adapter is None or bool(c.model.path),
        "model.adapter",
        "it goes on a base. Give model.path=<its base>, or the adapter alone as model.path",
    )
    packed = c.model.storage is not Storage.plain
    freezing = ", ".join(sorted(name for name, kind in axis_options("method").items() if kind.freezes_base))
    rule(
        not training or not packed or c.method.freezes_base,
        "model.storage",
        f"4 bits hold weights that stay as they are, and method={c.method.name} trains them. Use one of the methods "
        f"{freezing}, or plain",
    )
    rule(
        not packed or c.model.adapter_mode is AdapterMode.keep,
        "model.adapter_mode",
        "an adapter is merged into whole weights, and 4 bits would lose it. Merge first (tritune export export.form=merged) "
        "and begin on that export, or use model.storage=plain",
    )
    rule(
        not packed or not c.train.compile,
        "model.storage",
        "torch.compile does not see into NF4. Use train.compile=false",
    )
