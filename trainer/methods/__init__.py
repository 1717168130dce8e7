"""What trains: full fine-tuning and LoRA. A method marks parameters and adds layers; it knows nothing of data or ranks."""

from __future__ import annotations

from transformers import PreTrainedModel
from tritune.trainer.config import LoraConfig, MethodConfig
from tritune.trainer.methods.lora import add_lora
from tritune.trainer.methods.sites import TokenKeys


def apply_method(config: MethodConfig, model: PreTrainedModel, heads: list[str], seed: int) -> TokenKeys | None:
    """Make `model` trainable as the method says, in place.

    Args:
        heads: modules that are new and must train whatever the method (a classification head).
        seed: of the new weights.

    Returns:
        the object through which layers with dropout learn which tokens they see; None where there is no dropout.
    """
    if isinstance(config, LoraConfig):
        return add_lora(config, model, heads, seed)
    model.requires_grad_(True)
    return None
