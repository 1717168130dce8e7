"""Make a model trainable as its method says."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel
from tritune.trainer.config import MethodConfig
from tritune.trainer.methods.token_keys import TokenKeys


def apply_method(
    config: MethodConfig, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str] = ()
) -> TokenKeys | None:
    """Make `model` trainable as the method says, in place.

    Args:
        heads: modules that are new and must train whatever the method (a classification head).
        seed: of the new weights.
        unused: parameters that take no part in the loss (`reached.find_unused`); they stay frozen whatever the method.

    Returns:
        the object through which layers with dropout learn which tokens they see; None where there is no dropout.
    """
    frozen = [p for n, p in model.named_parameters(remove_duplicate=False) if n in unused]
    keys: TokenKeys | None = config.attach(model, heads, seed, unused)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return keys
