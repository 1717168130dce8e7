"""Characters that a tokenizer has no token for: it writes `<unk>`, from which nothing comes back, or their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data.remarks import Kind
from tritune.trainer.data.tokenizing import encode_batch
from tritune.trainer.errors import InputError

_LINES = (0x09, 0x0A, 0x0D, 0x20)  # that models with bytes have seen everywhere
Said = list[tuple[Kind, dict[str, int]]]


class Unspelt:
    """Counts the tokens that stand for such characters.

    Attributes:
        unknown: the id of `<unk>`, None where nothing becomes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        named = {
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        }  # some call one of these their unknown token, and never use it
        unknown = tokenizer.unk_token_id
        if unknown is None and (name := getattr(backend.model, "unk_token", None)) is not None:
            unknown = backend.token_to_id(name)
        self.unknown: int | None = None if unknown in named else unknown
        bytes_of = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256) if byte not in _LINES)
        self._bytes = frozenset(i for i in bytes_of if i is not None)
        self._any = self._bytes | ({self.unknown} if self.unknown is not None else frozenset())
        ascii_texts = [f"a{chr(code)}a" for code in range(0x20, 0x7F)]
        try:
            seen = encode_batch(backend, ascii_texts, ["ASCII"] * len(ascii_texts), specials=False)
            self._has_ascii = all(self._any.isdisjoint(one.ids) for one in seen)
        except InputError:  # it has no token for one of them, and none for what is unknown: rows show which
            self._has_ascii = False

    def said(self, ids: Sequence[int], text: str, encoding: Encoding, spans: Sequence[tuple[int, int]] = ()) -> Said:
        """What there is to say of a text: by kind, characters and how many tokens stand for them; mostly nothing.

        Args:
            spans: of tokens that are trained as answers.
        """
        # Most texts need no look at their tokens; of ASCII's control characters, where the rest is there, nothing is said.
        if (self._has_ascii and text.isascii()) or self._any.isdisjoint(ids):
            return []
        counts = {kind: Counter[str]() for kind in (Kind.unknown, Kind.unknown_answers, Kind.by_bytes)}
        offsets = encoding.offsets
        for number, (token, (start, stop)) in enumerate(zip(ids, offsets, strict=False)):
            if token in self._any and start < stop:
                characters = text[start:stop]
                counts[Kind.by_bytes if token in self._bytes else Kind.unknown].update(characters)
                if token == self.unknown and any(a <= number < b for a, b in spans):
                    counts[Kind.unknown_answers].update(characters)
        return [(kind, dict(count)) for kind, count in counts.items() if count]

    def spelt(self, ids: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
        """`num_bytes` of tokens, without those of `<unk>`: they are not spelled."""
        unknown = ids == self.unknown if self.unknown is not None else None
        return num_bytes if unknown is None or not unknown.any() else np.where(unknown, 0, num_bytes).astype(np.int32)
