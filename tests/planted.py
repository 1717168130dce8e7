"""Ranks with a fault planted in them: the known ways in which gradients come out wrong without a word.

Each `rank_with_*` stands in for `launch.processes._rank`; it lives in a module of its own because the fork server's children
import it by name.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from tritune.launch import processes

_rank = processes._rank


def rank_with_the_loss_divided_twice(*args) -> None:
    """DeepSpeed told of three micro-batches a step divides by three what the loop has already scaled."""
    from tritune.trainer.backends.zero import Zero

    settings = Zero._settings
    Zero._settings = lambda self: {**settings(self), "gradient_accumulation_steps": 3}
    Zero.backward = lambda self, loss: self.engine.backward(loss)
    _rank(*args)


def rank_with_the_flag_set_after_the_forward(*args) -> None:
    """DDP reads its flag in forward: set after it, the last micro-batch is run under the one before's, and not reduced."""
    from tritune.trainer.backends.local import Local

    def sync(self, *, last):
        self.last = last
        return nullcontext()

    def backward(self, loss):
        self.model.require_backward_grad_sync = self.last
        loss.backward()

    Local.sync, Local.backward = sync, backward
    _rank(*args)


def rank_with_the_head_read_through_full_tensor(*args) -> None:
    """Outside the module whose hooks gather it, the head's gradient stays what this rank alone computed."""
    from torch.distributed.tensor import DTensor
    from tritune.trainer.model.scorer import TokenScorer
    from tritune.trainer.objectives.language_model import LanguageModel
    from tritune.trainer.objectives.loss import Loss

    def score(self, batch, want):
        hidden = self.model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[batch.predict]

    def loss(self, model, batch):
        hidden = model(batch, "token_nll")
        weight = model.model.lm_head.weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        nll = torch.nn.functional.cross_entropy(hidden @ weight.T, batch.targets, reduction="sum")
        return Loss({"nll": nll})

    TokenScorer._score, LanguageModel.__call__ = score, loss
    _rank(*args)


def rank_with_a_mean_of_its_own(*args) -> None:
    """Each rank divides by its own number of tokens, so that a rank with few counts as much as one with many."""
    from tritune.trainer.backends.local import Local

    Local.sum = lambda self, x: x * self.dp_size
    _rank(*args)


def rank_that_tells_what_stays_gathered(*args) -> None:
    """No fault: after each step of ZeRO-3 it says which frozen parameters this rank still holds whole."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from tritune.trainer.backends.zero import Zero

    step = Zero.step

    def told(self, *given, **named):
        norm = step(self, *given, **named)
        frozen = {n: p for n, p in self.engine.module.named_parameters() if not p.requires_grad}
        whole = [n for n, p in frozen.items() if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE]
        print(f"of {len(frozen)} frozen parameters are whole: {whole}", flush=True)
        return norm

    Zero.step = told
    _rank(*args)


def rank_that_forgets_its_moments(*args) -> None:
    """A resume that reads parameters and nothing else."""
    from tritune.trainer.backends.fsdp import Fsdp

    def refresh(self):
        for name, shard in self.tensors().items():
            if name.endswith("exp_avg"):
                for part in shard.parts:
                    part.values.zero_()

    Fsdp.refresh = refresh
    _rank(*args)


def rank_with_one_bad_step(*args) -> None:
    """The second step's loss is not finite, its gradient is: nothing but the loop's own look at the loss refuses it."""
    from tritune.trainer.objectives.language_model import LanguageModel
    from tritune.trainer.objectives.loss import Loss

    score = LanguageModel.__call__

    def bad(self, model, batch):
        loss = score(self, model, batch)
        return Loss({"nll": loss.terms["nll"] + (torch.inf if batch.step == 2 else 0.0)})

    LanguageModel.__call__ = bad
    _rank(*args)


def rank_asked_to_stop_in_an_evaluation(*args) -> None:
    """Rank 1 gets a signal while it scores its first batch."""
    import os
    import signal

    from tritune.trainer.objectives.language_model import LanguageModel

    score, calls = LanguageModel.score, []

    def and_ask(self, model, batch):
        calls.append(1)
        if len(calls) == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, model, batch)

    LanguageModel.score = and_ask
    _rank(*args)


def rank_that_never_comes_back(cells, ports, variables, log) -> None:
    """`TRITUNE_PLANT=module:function` is entered, on rank 0 where there are several, and not left again."""
    import importlib
    import os
    import time
    from pathlib import Path

    module, _, name = variables["TRITUNE_PLANT"].partition(":")
    if variables.get("RANK", "0") == "0":

        def enter(*_, **__):
            Path(log).with_suffix(".entered").touch()
            time.sleep(600)

        setattr(importlib.import_module(module), name, enter)
    os.environ.update(variables)
    _rank(cells, ports, variables, log)
