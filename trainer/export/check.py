"""Read an export back with the tools its users have, and compare logits with those of the model that was trained."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging
from tritune.trainer.config.choices import Form, Storage
from tritune.trainer.errors import ExportError, reason
from tritune.trainer.export.write import export_dtype
from tritune.trainer.methods.adapter_open import add_saved_adapter
from tritune.trainer.model.load import auto_class, cast_parameters, storage_dtype
from tritune.trainer.model.quantized import round_trip

if TYPE_CHECKING:
    from tritune.trainer.export.source import Source

FLOAT32 = 1e-5  # of the largest logit, or of 1: a few hundred roundings of float32


@dataclass(frozen=True)
class Agreement:
    """How the reloaded model compares.

    Attributes:
        max_difference: of any logit; largest: the largest logit in absolute value.
        kl: mean over positions of KL(trained || reloaded), in nats.
        allowed: the difference that rounding explains.
        reader: what reloaded it.
    """

    max_difference: float
    largest: float
    kl: float
    allowed: float
    reader: str

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.allowed  # False for NaN

    def line(self) -> str:
        return (
            f"largest logit difference {self.max_difference:.1e} (allowed {self.allowed:.1e}, logits up to "
            f"{self.largest:.3g}), KL {self.kl:.1e} nats"
        )


def probe_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Two rows of random tokens, int64 [2, 32], the last of the vocabulary among them: added ones lie at its end."""
    vocab_size = min(len(tokenizer), _num_embeddings(model))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 32
    length = min(32, context)
    ids = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    last = min(length // 4, vocab_size)
    ids[0, :last] = torch.arange(vocab_size - last, vocab_size)
    ids[ids == tokenizer.pad_token_id] = (tokenizer.pad_token_id + 1) % vocab_size  # classifiers pool before padding
    return ids


def _num_embeddings(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0]


@torch.no_grad()
def compare(directory: Path, source: Source, form: Form, ids: Tensor) -> Agreement:
    """Reload `directory` and compare.

    In float32 the logits must agree to rounding. In bfloat16 the two may round differently on the way, so that the
    trained model must lie no further from the reloaded one run in float32 than twice (four times, if merging rounded the
    weights once more) as far as the reloaded one run in bfloat16 does: the test of Dao et al. for low-precision kernels.

    Raises:
        ExportError: the files do not load, or give logits of another shape.
    """
    trained = source.logits(ids).float().cpu()
    computes = getattr(torch, source.config.model.dtype.value)
    exact = computes in (torch.float32, torch.float64) and export_dtype(source.config.export, source.config.model) in (
        torch.float32,
        torch.float64,
    )
    device = _device(source)
    try:
        model, reader = _reload(directory, source, form, torch.float32)
        reloaded = _logits(model, ids, device)
        largest = float(trained.abs().max())
        allowed = FLOAT32 * max(largest, 1.0)
        if not exact:
            cast_parameters(model, torch.bfloat16)
            rounded = _logits(model, ids, device)
            allowed = max((4 if form is Form.merged else 2) * float((rounded - reloaded).abs().max()), allowed)
    except Exception as error:
        raise ExportError(f"{directory.name} was written and does not load: {reason(error)}") from error
    if trained.shape != reloaded.shape:
        raise ExportError(f"{reader} gives logits {list(reloaded.shape)}, the trained model {list(trained.shape)}")
    p, q = trained.double().log_softmax(-1), reloaded.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    difference = float((trained - reloaded).abs().max())
    return Agreement(difference, largest, max(kl, 0.0), allowed, reader)


def _logits(model: Any, ids: Tensor, device: torch.device) -> Tensor:
    """In float32: those of the tokens, since PEFT gives those of virtual tokens before them, too; or those of classes."""
    logits = model(input_ids=ids.to(device)).logits.float().cpu()
    return logits[:, -ids.shape[1] :] if logits.dim() == 3 else logits


def _reload(directory: Path, source: Source, form: Form, dtype: torch.dtype) -> tuple[Any, str]:
    auto = auto_class(source.model.config, bool(source.heads))
    hf_logging.disable_progress_bar()
    device = _device(source)
    if form is not Form.adapter:
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on disk is no surprise
        # Host memory holds one module's weights at a time, read from the export's own files when it computes.
        where = {"": "disk" if device.type == "cpu" else device}
        try:
            return auto.from_pretrained(directory, dtype=dtype, device_map=where).eval(), "transformers"
        except ValueError:  # the files hold other tensors than the model, as those of experts: they are made in memory
            return auto.from_pretrained(directory, dtype=dtype, device_map={"": device}).eval(), "transformers"
    options = {"num_labels": len(source.labels)} if source.heads else {}
    base = auto.from_pretrained(source.config.model.path, revision=source.config.model.revision, dtype=dtype, **options)
    base.config.pad_token_id = source.tokenizer.pad_token_id
    rows = _num_embeddings(source.model)
    if rows > _num_embeddings(base):
        base.resize_token_embeddings(rows, mean_resizing=False)
    if source.config.model.storage is Storage.nf4:
        round_trip(base, source.heads, storage_dtype(source.config.model.dtype, source.config.method))
    if why := source.config.method.unread_by_peft(source.model, source.heads):
        opened: Any = add_saved_adapter(directory, base, rows)
        return opened.to(device, dtype).eval(), f"Tritune ({why})"
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on ties: the logits are compared
        return PeftModel.from_pretrained(base, str(directory)).to(device, dtype).eval(), "PEFT"


def _device(source: Source) -> torch.device:
    """Where the export is tried: with the model, or on the CPU where that is one of meta tensors."""
    device = source.model.device
    return torch.device("cpu") if device.type == "meta" else device
