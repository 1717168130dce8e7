"""The words that configuration keys take, where there are few: one enumeration a key."""

from __future__ import annotations

from enum import StrEnum


class Dtype(StrEnum):
    """What forward and backward compute in. Master weights and moments are never below float32."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


class Attention(StrEnum):
    sdpa = "sdpa"
    eager = "eager"


class Storage(StrEnum):
    """How the linear layers of a frozen base are kept."""

    plain = "plain"
    nf4 = "nf4"


class AdapterMode(StrEnum):
    """What training does with an adapter that it is given: goes on with it, or merges it and begins another."""

    keep = "keep"
    merge = "merge"


class Kind(StrEnum):
    """What a row of the data is; `auto` reads it off the columns."""

    auto = "auto"
    messages = "messages"
    prompt_response = "prompt_response"
    text = "text"
    text_label = "text_label"


class TextUnit(StrEnum):
    """What one document of a plain-text file is."""

    file = "file"
    paragraph = "paragraph"
    line = "line"


class Unsupervised(StrEnum):
    """What happens to a row in which no token would be trained.

    `few`: it is left out and named where its answer lies beyond data.max_length and at most 1 row in 50 is so; else it ends the
    run before it starts, as an empty answer does.
    """

    few = "few"
    refuse = "refuse"
    drop = "drop"


class BadRows(StrEnum):
    """What happens to a row that cannot be read: it ends the run before it starts, or is counted and left out."""

    refuse = "refuse"
    skip = "skip"


class Overlong(StrEnum):
    """What happens to a row above `data.max_length`: it loses its end; the beginning or the middle of what is asked (of the
    text, in classification) so that its answers stay whole; it is left out; or it ends the run."""

    cut = "cut"
    cut_prompt_start = "cut_prompt_start"
    cut_prompt_middle = "cut_prompt_middle"
    drop = "drop"
    refuse = "refuse"

    @property
    def cuts(self) -> bool:
        """Whether such a row is trained on."""
        return self not in (Overlong.drop, Overlong.refuse)


class HeldOut(StrEnum):
    """Which rows `data.validation_share` and `data.test_share` take: by `hash` of their content, so that they lie anywhere and
    stay what they are whatever else the file holds; or `contiguous`, the end of each file. `auto` is the end for plain text
    that is cut in units, or is one file, whose neighbours tell of one another; else by hash."""

    auto = "auto"
    hash = "hash"
    contiguous = "contiguous"


class Unrendered(StrEnum):
    """What happens where the chat template leaves out something that a row holds: it ends the run, or is said and trained
    without."""

    refuse = "refuse"
    warn = "warn"


class SpecialTokens(StrEnum):
    """What control tokens in the data are (`<|im_end|>`, BOS): `text` like any other, or the tokens themselves."""

    text = "text"
    keep = "keep"


class Turns(StrEnum):
    """How the trained turns of a conversation lie in rows: `auto` keeps those together that its template writes in one text as
    it does when they are asked for; `each` makes every one a row of its own, which ends with it."""

    auto = "auto"
    each = "each"


class Duplicates(StrEnum):
    """What happens to a row that stands in the same source before: `drop` takes out those with equal content and label,
    `drop_near` also those that are nearly the same (`data.similarity`)."""

    keep = "keep"
    drop = "drop"
    drop_near = "drop_near"


class Packing(StrEnum):
    """What a sequence of `train.batch_size` is: one row, or rows packed into `data.max_length` tokens, best fit decreasing."""

    none = "none"
    best_fit = "best_fit"


class SystemTurn(StrEnum):
    """What happens to a conversation's system turns: they stay, or are put before the words of the user's next turn, for
    templates that know no such role."""

    keep = "keep"
    merge = "merge"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Bias(StrEnum):
    """Which biases LoRA trains: none, every one of the model, or those of the layers it adapts (PEFT's meanings)."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class Resume(StrEnum):
    """`auto` continues the run in `run.dir` if there is one, `require` refuses to start a new one, `never` the reverse."""

    auto = "auto"
    require = "require"
    never = "never"


class Form(StrEnum):
    """What is written at the end: the adapter alone (PEFT's layout), the model with it merged in, or the model that
    trained whole. `auto` is `adapter` where one was trained, else `full`."""

    auto = "auto"
    adapter = "adapter"
    merged = "merged"
    full = "full"


class Activations(StrEnum):
    """What a decoder layer keeps for backward: everything; its input, the rest being computed again; or its input and
    what matrix products and attention gave, which is what costs most to compute again."""

    none = "none"
    full = "full"
    selective = "selective"


class Implementation(StrEnum):
    """What computes a kernel: Triton's code, PyTorch's, or, with `auto`, what `kernels` says for all."""

    auto = "auto"
    triton = "triton"
    reference = "reference"
