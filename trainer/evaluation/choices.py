"""Which of a few answers does a language model find likeliest? Accuracy without a classification head.

The choices are beginnings of an answer (`refund`, `A`, `yes`). Each is put after a row's prompt, and the one with the largest
sum of token log-probabilities is the model's choice: multiple-choice accuracy as in Brown et al. 2020 (arXiv 2005.14165) and
the evaluation harnesses, with no normalisation by length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from tritune.trainer.backends import Backend
from tritune.trainer.data.examples import Columns, Examples
from tritune.trainer.data.loader import evaluation_batches
from tritune.trainer.errors import InputError
from tritune.trainer.metrics.classification import classification_report, confusion
from tritune.trainer.shown import bounded


@dataclass(frozen=True)
class Choices:
    """A split with every choice after every prompt: row i and choice c stand at i * C + c.

    Attributes:
        examples: N * C rows, the choice's tokens supervised.
        right: int64 [N], the number of each row's right choice.
        num_choices: C.
    """

    examples: Examples
    right: Tensor
    num_choices: int


def lay_out(split: Examples, choices: list[str], tokenizer: PreTrainedTokenizerBase) -> Choices:
    """Build the rows to score from a split of prompts and answers.

    Raises:
        InputError: a row whose answer begins with none of the choices.
    """
    variants = _encodings(choices, tokenizer)
    rows, right = Columns(), []
    for i in range(len(split)):
        ids = split.ids(i)
        first = int(split.spans(i)[0, 0])
        answer = ids[first:].tolist()
        said = str(tokenizer.decode(answer)).lstrip()
        found = next((c for c, choice in enumerate(choices) if said.startswith(choice)), None)
        if found is None:
            rule = f"the answer {bounded(said, 40)!r} begins with none of {', '.join(choices)}"
            raise InputError(split.place(i), rule, "Mend the row or evaluation.choices")
        right.append(found)
        # As in this row's answer: where a turn's mark stands before it, or a space.
        encoded = max(variants, key=lambda encoded: _common(encoded[found], answer))
        for tokens in encoded:
            rows.add([*ids[:first], *tokens], [(first, first + len(tokens))], split.place(i))
    return Choices(Examples([pa.Table.from_batches([rows.batch()])]), torch.tensor(right), len(choices))


def _encodings(choices: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """The choices' tokens at the start of a text, and after a line end: tokenizers that mark words tell these apart."""
    after = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    return [
        [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices],
        [tokenizer("\n" + choice, add_special_tokens=False)["input_ids"][after:] for choice in choices],
    ]


def _common(tokens: list[int], answer: list[int]) -> int:
    """How many tokens the answer begins with."""
    return next((i for i, (a, b) in enumerate(zip(tokens, answer, strict=False)) if a != b), len(tokens))


@torch.no_grad()
def choose(
    model: nn.Module, choices: Choices, backend: Backend, batch_size: int, pad_id: int,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Return accuracy and macro figures of the model's choices; the same on all ranks. The model is in evaluation mode.

    Args:
        heed: as in `evaluate`.
    """
    nll = torch.zeros(len(choices.examples), dtype=torch.float64, device=backend.device)
    batches = evaluation_batches(choices.examples, batch_size, pad_id, backend.dp_rank, backend.dp_size, backend.device)
    for batch in batches:
        heed()
        rows = batch.document_of(batch.predict)
        nll.index_add_(0, batch.sample_ids[rows], model(batch, "token_nll").double())
    chosen = backend.sum(nll).cpu().reshape(-1, choices.num_choices).argmin(dim=1)
    return classification_report(confusion(choices.right, chosen, choices.num_choices))
