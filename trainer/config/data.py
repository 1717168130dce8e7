"""What is read, and what becomes of its rows before they are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from tritune.trainer.config.choices import (
    BadRows,
    Duplicates,
    HeldOut,
    Kind,
    Overlong,
    Packing,
    SpecialTokens,
    SystemTurn,
    TextUnit,
    Turns,
    Unrendered,
    Unsupervised,
)

# Who speaks in a conversation.
ROLES = ("system", "user", "assistant", "tool")

# Our names of a row's columns, which data.columns maps to a file's.
COLUMNS = ("messages", "tools", "system", "history", "prompt", "input", "response", "text", "label")

# Splits that have a file of their own beside the training rows.
SPLIT_FILES = ("validation", "test", "retention")


@dataclass
class SourceConfig:
    """One of several sources of training rows (`data.sources.<name>`)."""

    path: str | None = None  # as data.train
    weight: float | None = None  # share of the rows of an epoch, relative; default: how many rows it has
    epochs: float | None = None  # instead: how often its rows come in an epoch of the mixture
    loss_weight: float = 1.0  # of each of its tokens or rows in the loss
    columns: dict[str, str] = field(default_factory=dict)  # instead of data.columns, for this source


@dataclass
class DataConfig:
    train: str | None = (
        None  # .jsonl .csv .parquet .txt (.gz .zst), shards, a datasets folder, or hf://name[@config]:split
    )
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # instead of `train`: several, mixed
    streaming: bool = False  # read the training rows as they are needed: for what fits neither memory nor disk
    temperature: float = 1.0  # sources: shares are weights to the power 1 / temperature
    validation: str | None = None  # a file as `train`, scored while it trains
    test: str | None = None  # a file as `train`, scored before and after
    retention: str | None = None  # text of the base model's own domain: scored before and after, to show forgetting
    validation_share: float = 0.0  # cut from `train` as `held_out` says, where `validation` is not given
    test_share: float = 0.0  # the same for `test`
    held_out: HeldOut = HeldOut.auto  # which rows the shares take
    kind: Kind = Kind.auto
    columns: dict[str, str] = field(
        default_factory=dict
    )  # our name -> the file's: prompt: instruction, label: category; several of a row are joined: text: title+body
    split_columns: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # the same for validation, test or retention alone: test: {prompt: question}
    ignore: list[str] = field(default_factory=list)  # columns and message keys that are not read, nor said to be unread
    system_turn: SystemTurn = SystemTurn.keep
    text_unit: TextUnit = TextUnit.paragraph
    max_length: int = 512  # tokens per row; pretraining cuts the text into blocks of this length
    overlong: Overlong = Overlong.cut  # rows above max_length: what they lose, or whether they are trained on
    stride: int = 0  # pretraining: tokens that a block repeats of the one before, read but not trained again
    packing: Packing = Packing.none  # sequences of a step: rows, or packs of rows that do not see one another
    pack_window: int = 16384  # rows among which each pack is filled
    group: str | None = None  # a column: rows with the same value fall into the same split
    duplicates: Duplicates = Duplicates.keep  # rows that stand earlier in the same source
    similarity: float = 0.8  # from which texts are nearly the same: Jaccard similarity of their word 3-grams
    bad_rows: BadRows = BadRows.refuse
    unsupervised: Unsupervised = Unsupervised.few  # rows without a token to train on
    unrendered: Unrendered = Unrendered.refuse  # what the chat template does not write of a row
    special_tokens: SpecialTokens = SpecialTokens.text  # what `<eos>` in a row says
    require_stop_token: bool = True  # refuse chat data in which no stop token is ever trained
    train_on: list[str] = field(default_factory=lambda: ["assistant"])  # roles whose turns are trained
    last_turn_only: bool = False  # of these turns only the last
    turns: Turns = Turns.auto  # whether the trained turns of a conversation stay in one row
    labels: list[str] = field(default_factory=list)  # classification: the label set; default: those of `train`


@dataclass
class CacheConfig:
    """Where tokenized rows are kept and how they are made; nothing of it is part of what a run is."""

    dir: str | None = None  # default: $TRITUNE_CACHE, or ~/.cache/tritune
    num_procs: int | None = None  # processes that tokenize, on each host; default: its cores


class Check(StrEnum):
    """What an audit can find. `audit.fail_on` names those that end it, and a training run before it starts."""

    unreadable = "unreadable"  # a source or a split gives no rows at all
    bad_rows = "bad_rows"  # rows that cannot be read, or too long with data.overlong=refuse
    unsupervised = "unsupervised"  # rows without a token to train on
    empty_answers = "empty_answers"  # rows whose answer holds nothing
    empty_prompts = "empty_prompts"  # rows that ask nothing
    unrendered = "unrendered"  # contents, calls of tools, tools or thoughts that the template leaves out
    control_tokens = "control_tokens"  # texts that spell tokens which frame turns
    unspelt = "unspelt"  # characters for which the tokenizer has no token
    turns_apart = "turns_apart"  # a template writes earlier answers otherwise: they are rows of their own
    over_context = "over_context"  # data.max_length above the model's context
    truncation = "truncation"  # rows above data.max_length
    truncated_answers = "truncated_answers"  # rows whose answer lost its end
    no_stop_token = "no_stop_token"  # no row of a split trains a stop token
    double_bos = "double_bos"  # rows that begin with two BOS tokens
    template_mismatch = "template_mismatch"  # a model is trained on something other than it is asked with
    duplicates_exact = "duplicates_exact"  # rows that stand in the same source before
    duplicates_near = "duplicates_near"  # rows that nearly equal an earlier one
    leakage_exact = "leakage_exact"  # rows of another split that stand in train
    leakage_near = "leakage_near"  # rows of another split that nearly stand in train
    leakage_prompt = "leakage_prompt"  # rows whose prompt stands in train with another answer
    split_leaked = "split_leaked"  # a twentieth of a split's rows or more stand in train
    contradictions = "contradictions"  # one text, several labels
    same_prompt = "same_prompt"  # one prompt, several answers
    unknown_labels = "unknown_labels"  # labels that the label set does not have
    label_balance = "label_balance"  # labels with less than a tenth of the rows of the commonest
    personal = "personal"  # addresses and numbers of persons
    unread = "unread"  # columns and message keys that hold something, and that nothing reads
    similar_labels = "similar_labels"  # labels that differ by case, space or Unicode form alone
    credentials = "credentials"  # keys and passwords
    mojibake = "mojibake"  # text that was decoded wrongly: U+FFFD, UTF-8 read as Windows-1252


# Always a fault, and nothing that an honest data set has: repeated rows and single leaks do occur in those.
FAIL_ON = (Check.unreadable, Check.bad_rows, Check.unsupervised, Check.over_context, Check.no_stop_token,
           Check.double_bos, Check.template_mismatch, Check.unrendered, Check.split_leaked, Check.unknown_labels)  # fmt: skip


@dataclass
class AuditConfig:
    """`tritune audit`, and what of it runs before training."""

    fail_on: list[str] = field(default_factory=lambda: [c.value for c in FAIL_ON])  # exit status 2, and no training
    near_duplicates: bool = True  # look for rows that are nearly the same
    personal: bool = True  # look for e-mail and IP addresses, telephone and card numbers, IBANs, keys and passwords
    out: str | None = None  # folder of the results; default: audit in run.dir, or here


def training_sources(data: DataConfig) -> dict[str, tuple[str, str]]:
    """Name -> path and config key of each source of training rows; `train` where there is only `data.train`."""
    if data.sources:
        return {name: (source.path or "", f"data.sources.{name}.path") for name, source in data.sources.items()}
    return {"train": (data.train, "data.train")} if data.train is not None else {}


def held_out_sources(data: DataConfig) -> dict[str, tuple[str, str]]:
    """Split -> path and config key of each held-out split that has a file of its own; not of the retention text."""
    files = {"validation": data.validation, "test": data.test}
    return {name: (path, f"data.{name}") for name, path in files.items() if path is not None}


def columns_key(data: DataConfig, key: str) -> str:
    """The config key of the mapping that a source has: its own, its split's or that of all.

    Args:
        key: of the source: `data.train`, `data.sources.chat.path`, `data.test`.
    """
    parts = key.split(".")
    if len(parts) > 2 and parts[1] == "sources" and data.sources[parts[2]].columns:
        return f"data.sources.{parts[2]}.columns"
    return f"data.split_columns.{parts[-1]}" if data.split_columns.get(parts[-1]) else "data.columns"


def data_of(data: DataConfig, key: str) -> DataConfig:
    """The settings of one source: those of all, with its own mapping of columns."""
    match columns_key(data, key).split("."):
        case [_, "sources", name, _]:
            return replace(data, columns=data.sources[name].columns)
        case [_, "split_columns", split]:
            return replace(data, columns=data.split_columns[split])
    return data
