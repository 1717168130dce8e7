"""What every run does first, done once in the fork server and inherited by its forks; imported for that effect alone.

Measured: a forked rank of a small run spends 0.35 s of its 0.9 s of CPU here. No tensor is computed: a fork must find no thread.
"""

from __future__ import annotations

from contextlib import suppress

from tritune.trainer.config.compose import compose_partly

compose_partly(["seed=0"])  # the schemas, Hydra's plugins and its parser's tables
with suppress(ImportError):
    import pandas  # noqa: F401  PyArrow imports it with the first array that is made of a list
with suppress(ImportError, AttributeError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # a table of all families, built with the first model that is loaded
