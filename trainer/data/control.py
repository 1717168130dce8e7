"""Control tokens in the data are text: what a row says of `<|im_end|>` must not end a turn.

A row's own texts are masked before a template sees them: each control token in them becomes as many characters of no script, so
that what the template itself writes can be told apart, and every place in the text stays where it is. Such a text is encoded by a
twin of the tokenizer that takes control tokens for text (`encode_special_tokens`) and knows those of the template by another
name; what lies between them is tokenized as ever. Rows without control tokens never meet the twin.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data.tokenizing import encode_batch
from tritune.trainer.errors import InputError

# What answers are written with: rows hold these as the tokens that they are.
_WRITTEN = re.compile(r"</?(think|thinking|tool_calls?|tool_responses?|answer)>")
# Two planes in which Unicode has no character: masks of the data's tokens, and other names of the template's.
_MASKS, _NAMES = 0x50000, 0x60000
_PLANE = 0xFFF0
_TAKEN = re.compile("[\U00050000-\U0006fffd]")


class ControlTokens:
    """Finds, masks and encodes.

    Args:
        tokens: that are control tokens besides those that the tokenizer calls special: what frames a turn.
        keep: leave them in the data what they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str] = (), keep: bool = False) -> None:
        self.keep, self._backend = keep, tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        added = {str(token): token for token in self._backend.get_added_tokens_decoder().values()}
        found = {name: t for name, t in ((t.content, t) for t in added.values()) if t.special or name in set(tokens)}
        self._tokens = {n: t for n, t in found.items() if n and not _WRITTEN.fullmatch(n)}
        names = sorted(self._tokens, key=len, reverse=True)[:_PLANE]
        self._masks = {name: chr(_MASKS + i) * len(name) for i, name in enumerate(names)}
        self._names = {name: chr(_NAMES + i) * len(name) for i, name in enumerate(names)}
        self._firsts = tuple({name[0] for name in names})
        self._starts = tuple({name[:2] for name in names})
        self._any = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        back = {mask: name for name, mask in self._masks.items()}
        self._unmask = re.compile("|".join(map(re.escape, back)) or r"(?!)")
        self._named = back | self._names  # of a masked text, for the twin

    def found(self, *texts: Any) -> dict[str, int]:
        """The control tokens in texts, or values that hold some, and how often; mostly none, which is found out fast."""
        counts: Counter[str] = Counter()
        for text in texts:
            if type(text) is str:
                for first in self._firsts:
                    if first in text:
                        counts.update(self._any.findall(text) if any(start in text for start in self._starts) else ())
                        break
            elif text:
                counts.update(self.found(*_inside(text)))
        return dict(counts) if counts else {}

    def found_in_turns(self, messages: Sequence[dict], tools: list | None) -> dict[str, int]:
        """Those of a conversation; of most messages the content is all that there is to look at."""
        texts = [m.get("content") if len(m) == 2 else m for m in messages]
        return self.found(*texts, tools)

    def mask(self, value: Any, place: str) -> Any:
        """The value with every control token in its texts masked.

        Raises:
            InputError: a text has characters that masks are made of.
        """
        if isinstance(value, str):
            if taken := _TAKEN.search(value):
                rule = f"the row has control tokens, and the character U+{ord(taken[0]):X}, which stands for one here"
                raise InputError(place, rule, "Take one of them out of the row, or data.special_tokens=keep")
            return self._any.sub(lambda match: self._masks[match[0]], value)
        if isinstance(value, dict):
            return {self.mask(key, place): self.mask(part, place) for key, part in value.items()}
        return [self.mask(part, place) for part in value] if isinstance(value, list | tuple) else value

    def unmask(self, text: str, place: str) -> str:
        """The text itself, of the same length.

        Raises:
            InputError: the template wrote a mask otherwise.
        """
        for mask in self._masks.values() if "\\ud" in text else ():
            if json.dumps(mask)[1:-1] in text:
                rule = "the template writes a control token of the row's text in escapes, where it cannot be told apart"
                raise InputError(place, rule, "Take it out of the row, or data.special_tokens=keep")
        return self._unmask.sub(lambda match: self._named[match[0]], text)

    def encode(
        self, texts: list[str], masked: Sequence[bool], places: Sequence[str], specials: bool
    ) -> Iterator[tuple[list[int], Encoding]]:
        """Yield the token ids of texts, and their encodings, of which all but the ids hold; masked ones by the twin.

        Args:
            places: of the rows that the texts are of.
            specials: add those that the tokenizer itself adds.

        Raises:
            InputError: the tokenizer fails on a text.
        """
        plain = [(text, place) for text, place, hidden in zip(texts, places, masked, strict=True) if not hidden]
        encoded = iter(encode_batch(self._backend, [text for text, _ in plain], [p for _, p in plain], specials))
        for text, place, hidden in zip(texts, places, masked, strict=True):
            if hidden:
                yield self._apart(text, place, specials)
            else:
                one = next(encoded)
                yield one.ids, one

    def _apart(self, text: str, place: str, specials: bool) -> tuple[list[int], Encoding]:
        twin, numbers = self._twin
        renamed = re.sub(f"{self._any.pattern}|{self._unmask.pattern}", lambda match: self._named[match[0]], text)
        [encoding] = encode_batch(twin, [renamed], [place], specials)
        return [numbers.get(i, i) for i in encoding.ids], encoding

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, int]]:
        """The twin, and the ids that its names stand for."""
        description = json.loads(self._backend.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._tokens
        model = description["model"]
        if model["type"] == "Unigram":  # which would find them among its words
            model["vocab"] = [
                [f"{chr(_MASKS + _PLANE)}{p}" if p in self._tokens else p, score] for p, score in model["vocab"]
            ]
        twin = Tokenizer.from_str(json.dumps(description))
        twin.no_truncation()
        twin.no_padding()
        twin.add_tokens([
            AddedToken(self._names[n], single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized)
            for n, t in self._tokens.items()
        ])  # fmt: skip
        twin.encode_special_tokens = True
        ids: dict[int, int] = {twin.token_to_id(self._names[n]): self._backend.token_to_id(n) for n in self._tokens}  # type: ignore[misc]
        return twin, ids


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list | tuple) else ()
