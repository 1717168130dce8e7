"""`TokenScorer`: the one module that the loop runs; the loss is computed inside its forward.

FSDP2 and ZeRO-3 gather parameters in module hooks, so whatever reads the output head must run between them. The scorer
holds the Hugging Face model and returns token losses or class scores; objectives are arithmetic on these.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from tritune.kernels.dropout import token_keys, token_keys_at
from tritune.kernels.linear_cross_entropy import token_nll_reference
from tritune.trainer.batch import Batch, rows_of
from tritune.trainer.errors import InputError
from tritune.trainer.methods.token_keys import TokenKeys
from tritune.trainer.model.attention import document_bounds, within_rows
from tritune.trainer.model.load import CLASS_HEAD

Want = Literal["token_nll", "summed_nll", "last_logits", "class_logits"]


class TokenScorer(nn.Module):
    """Scores a micro-batch with a causal model.

    Args:
        model: a causal language model or a sequence classifier.
        keys: shared with the layers that draw dropout masks; None where none do.
        seed: of the run, for those masks.
        chunk_tokens: how many tokens' logits exist at a time.
        fused_head: whether the output head takes targets (`kernels.install`).
    """

    def __init__(
        self, model: PreTrainedModel, keys: TokenKeys | None, seed: int, chunk_tokens: int, fused_head: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.keys, self.seed, self.chunk_tokens, self.fused_head = keys, seed, chunk_tokens, fused_head
        # The head computes once for each chunk of a rank's own tokens, and ranks have unequally many: ZeRO-3 gathers it once, in
        # this module's hooks, or one rank would wait for a gathering that the others never begin.
        head = model.get_output_embeddings()
        self.computes: list[nn.Module] = [] if fused_head or head is None else [head]
        for adapted in (m for m in self.computes if hasattr(m, "direct")):
            adapted.direct = True  # type: ignore[assignment]
        self._widest = torch.float64 if next(model.parameters()).dtype == torch.float64 else None

    def forward(self, batch: Batch, want: Want) -> Tensor:
        """Return what is wanted of `batch`.

        `token_nll`: [M], -log p of each target token. `summed_nll`: [], their sum. `last_logits`: [D, V] after each document's
        last token. `class_logits`: [D, C] from the classification head. All in float32 or wider.
        """
        if self._widest is not None:
            with KeepFloat64():
                return self._score(batch, want)
        return self._score(batch, want)

    def _score(self, batch: Batch, want: Want) -> Tensor:
        keys = None
        if self.keys is not None and self.training:
            keys = _keys(self.seed, batch)
            self.keys.set(keys)
        decoder = getattr(self.model, self.model.base_model_prefix)
        # No attention mask: rows are padded on the right and attention is causal, so the mask would change no real
        # token, and without it SDPA takes its fast causal path. Packed documents are told apart by their positions.
        hidden = decoder(
            input_ids=batch.input_ids, use_cache=False, **document_bounds(batch, self.model)
        ).last_hidden_state
        flat = hidden.reshape(batch.input_ids.numel(), -1)
        last = batch.starts + batch.lengths - 1
        if want in ("token_nll", "summed_nll"):
            predicting, summed = flat[batch.predict], want == "summed_nll"
            if self.fused_head:
                head = self.model.get_output_embeddings()
                return head(predicting, batch.targets, "sum" if summed else "none", self.chunk_tokens)
            head = self._head(keys, batch.predict)
            nll = token_nll_reference(predicting, head, batch.targets, self.chunk_tokens)
            return nll.sum() if summed else nll
        if want == "last_logits":
            logits = self._head(keys, last)(flat[last], 0, len(last))
        else:
            logits = getattr(self.model, CLASS_HEAD)(flat[last])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logits(self, input_ids: Tensor) -> Tensor:
        """The Hugging Face model's own logits, [B, T, V] or [B, C] of a classifier."""
        with within_rows(self.model):
            return self.model(input_ids=input_ids.to(self.model.device), use_cache=False).logits

    def generate(self, **arguments) -> Tensor:
        """The model's own `generate`, for whoever must gather parameters around it."""
        with within_rows(self.model):
            return self.model.generate(**arguments)  # type: ignore[operator]

    def _head(self, keys: Tensor | None, positions: Tensor):
        """Return the output head as a function of hidden[start:stop], start, stop, as the model's family computes it."""
        config = self.model.config.get_text_config()
        output = self.model.get_output_embeddings()

        def head(hidden: Tensor, start: int, stop: int) -> Tensor:
            if keys is not None and self.keys is not None:
                self.keys.set(keys.reshape(-1)[positions[start:stop]])
            return scaled_logits(output.forward(hidden), config)  # without hooks: see `computes`

        return head


def _keys(seed: int, batch: Batch) -> Tensor:
    """Of every token, [B, T]: the same whether its document stands alone or among others."""
    if batch.packs is None:
        return token_keys(seed, batch.step, batch.sample_ids, batch.input_ids.shape[1])
    return token_keys_at(seed, batch.step, batch.sample_ids[batch.packs.documents], batch.packs.positions)


def scaled_logits(logits: Tensor, config) -> Tensor:
    """Apply what some families do after the head: Cohere multiplies, Granite divides, Gemma 2 caps (tanh)."""
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


# Families whose losses a test compares with transformers' own logits; any other is compared when it is loaded.
TESTED_FAMILIES = (
    "cohere", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
)  # fmt: skip


@torch.no_grad()
def require_same_logits(scorer: TokenScorer) -> None:
    """Refuse a model that computes its logits in a way the scorer does not know: its loss would be silently wrong.

    Raises:
        InputError: on a short row the two losses differ by more than rounding.
    """
    model, num_tokens = scorer.model, 8
    ids = torch.arange(num_tokens) * 7 % model.config.get_text_config().vocab_size
    batch = rows_of(ids[None])
    training = scorer.training
    scorer.eval()
    nll = scorer(batch, "token_nll")
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].to(nll.dtype)
    scorer.train(training)
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    tolerance = 2**-6 if logits.dtype is torch.bfloat16 or next(model.parameters()).dtype is torch.bfloat16 else 1e-4
    error = float(((nll - expected).abs() / expected.abs().clamp(min=1)).max())
    if not error <= tolerance:
        family = model.config.model_type
        rule = f"its losses differ from transformers' own logits by {error:.1e}: this family does something after its decoder"
        raise InputError(f"model_type {family}", rule, f"Families known to agree: {', '.join(TESTED_FAMILIES)}")


class KeepFloat64(TorchFunctionMode):
    """Ignore casts from float64 to float32 inside a model whose code casts norms and softmax to float32.

    `model.dtype=float64` exists for proofs: with these casts, equality between splits would stop at 1e-8.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            # Angles up to transformers 5.17: frequencies whose cast is ignored, by positions that really are float32.
            args = tuple(x.double() for x in args) if torch.float64 in {x.dtype for x in args} else args
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            narrows = func is torch.Tensor.float or torch.float32 in args[1:] or kwargs.get("dtype") is torch.float32
            if narrows and func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type):
                return args[0]
            if kwargs.get("dtype") is torch.float32:  # softmax(x, dtype=torch.float32) and the like
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
