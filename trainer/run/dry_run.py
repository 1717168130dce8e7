"""The most expensive micro-batch first: what does not fit in memory, or computes no number, is known before the first step."""

from __future__ import annotations

import torch
from tritune.trainer.config.choices import Dtype, Packing
from tritune.trainer.errors import InputError
from tritune.trainer.loop import Run
from tritune.trainer.model.attention import require_documents_apart
from tritune.trainer.model.finite import require_a_loss


def dry_run(run: Run) -> None:
    """Run the most expensive micro-batch forward and backward, and forget its gradients.

    Memory runs out here and not at step 200; and DDP settles its buckets, so that a resumed run reduces in the same
    order as one that was never stopped. Sharded backends gather parameters here: a rank that fails alone leaves the others
    waiting, until `backend.timeout_seconds`.

    Raises:
        InputError: it does not fit in memory, or its loss is no finite number.
    """
    run.model.train()
    with run.world.raise_on_all("trying the longest micro-batch"):  # no gradient is reduced: `ddp` waits for none
        try:
            loss = _forward_and_backward(run, last=False)
        except torch.OutOfMemoryError as error:
            rule = f"the longest micro-batch does not fit in memory ({str(error).splitlines()[0]})"
            remedy = "Use a smaller train.micro_batch_size (the run stays the same), or a shorter data.max_length"
            raise InputError(f"train.micro_batch_size={run.loader.dealer.micro_batch_size}", rule, remedy) from None
        model = run.config.model
        value = f"model.path={model.path}" if model.path else f"model.config={model.config}"
        require_a_loss(loss, run.core, value, "on the longest micro-batch, before any step,")
    _forward_and_backward(run, last=True)
    run.backend.forget()
    if run.config.data.packing is not Packing.none:
        _require_documents_apart(run)


def _require_documents_apart(run: Run) -> None:
    """On this run's own model, as the backend wrapped it."""
    config, want = run.config, "class_logits" if run.heads else "token_nll"
    run.model.eval()
    require_documents_apart(
        lambda batch: run.model(batch, want), run.core.config.get_text_config().vocab_size, run.world.device,
        half=config.model.dtype is Dtype.bfloat16,
    )  # fmt: skip
    run.model.train()


def _forward_and_backward(run: Run, last: bool) -> float:
    """The sum of the losses."""
    total = 0.0
    for batch in run.loader.longest():
        with run.backend.sync(last=last):
            loss = torch.stack(list(run.objective(run.model, batch).terms.values())).sum()
            run.backend.backward(loss * 0.0)
        total += float(loss.detach())
    return total
