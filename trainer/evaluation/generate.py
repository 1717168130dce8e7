"""Free answers: batched generation through transformers, on prompts that are token ids already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import GenerateConfig
from tritune.trainer.errors import InputError
from tritune.trainer.model.scorer import KeepFloat64
from tritune.trainer.parallel.distributed import World

Generate = Callable[..., Tensor]  # a model's `generate`


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt.

    Attributes:
        text: without special tokens.
        num_tokens: that it said, the stop token included.
        stopped: whether it ended by itself; False where `max_new_tokens` cut it.
    """

    text: str
    num_tokens: int
    stopped: bool


@dataclass(frozen=True)
class Share:
    """How ranks share batches: each takes one in turn.

    Attributes:
        together: every forward needs all ranks, which hold a part of the model each.
    """

    world: World | None = None
    together: bool = False

    def padded(self, batches: list[int]) -> list[int]:
        """So many that each rank takes equally many, where all must be called equally often: the first come again."""
        missing = -len(batches) % self.world.size if self.world is not None and self.together else 0
        return batches + [batches[i % len(batches)] for i in range(missing)] if batches else batches

    def takes(self, number: int) -> bool:
        return self.world is None or number % self.world.size == self.world.rank

    def joined(self, answers: list[list[Answer]]) -> list[list[Answer]]:
        """All ranks' answers, on each; one that several gave is the same."""
        every = [answers] if self.world is None else self.world.gather(answers)
        return [next((a for a in given if a), []) for given in zip(*every, strict=True)]


def lack_of_room(ids: Sequence[int], place: str, max_new: int, context: int | None) -> InputError | None:
    """Why a prompt cannot be answered within the model's context; None where it can."""
    if not ids:
        return InputError(place, "the prompt has no token", "Write something")
    if context is not None and len(ids) + max_new > context:
        rule = f"{len(ids)} tokens and generate.max_new_tokens={max_new} exceed the model's context of {context}"
        return InputError(place, rule, "Shorten the prompt, or lower generate.max_new_tokens")
    return None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    model_generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    stops: Sequence[int],
    device: torch.device,
    seed: int = 0,
    float64: bool = False,
    share: Share | None = None,
) -> list[list[Answer]]:
    """Return for each prompt `config.num_samples` answers, in the order of the prompts.

    Only `config` decides how tokens are chosen: a model's own generation settings (a repetition penalty, say) do not.

    Prompts of like length share a batch, padded on the left. With a temperature, the draw of a batch depends on (seed, the
    prompts and `config.batch_size`): the same command gives the same answers, on any number of ranks.

    Args:
        share: how several ranks share the batches; None where each rank answers all.
    """
    share = share or Share()
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=config.temperature > 0, num_beams=1,
        num_return_sequences=config.num_samples, eos_token_id=list(stops) or None,
        pad_token_id=tokenizer.pad_token_id, use_cache=True,
        **({"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
           if config.temperature > 0 else {}),
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[Answer]] = [[] for _ in prompts]
    starts = list(range(0, len(order), config.batch_size))
    for number, start in enumerate(share.padded(starts)):
        if not share.takes(number):
            continue
        rows = order[start : start + config.batch_size]
        width = len(prompts[rows[0]])
        ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(rows):
            ids[b, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[b, width - len(prompts[i]) :] = 1
        torch.manual_seed(seed + start)
        with KeepFloat64() if float64 else nullcontext(), _own_settings(model):
            out = model_generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings,
                **({"synced_gpus": True} if share.together else {}),
            )  # fmt: skip
        said = out[:, width:].tolist()
        for b, i in enumerate(rows):
            mine = said[b * config.num_samples : (b + 1) * config.num_samples]
            answers[i] = [_answer(tokens, tokenizer, set(stops)) for tokens in mine]
    return share.joined(answers)


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Put the model's generation config aside: transformers would fill from it whatever a call leaves open."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _answer(tokens: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Answer:
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Answer(str(text), len(tokens) if end is None else end + 1, end is not None)
