"""From the data config to tokenized splits: what is read, how it is divided, what it becomes for the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import SPLITS, Config, DataConfig
from tritune.trainer.config_choices import Kind
from tritune.trainer.data.examples import Examples, blocks, conversations, documents, labelled
from tritune.trainer.data.kinds import Record, read_records, split_by_content
from tritune.trainer.errors import InputError

RETENTION_TOKENS = 2048  # a document of the retention text is cut here, or at the model's context if that is shorter


@dataclass
class Splits:
    """Tokenized rows by split (train, validation, test, retention) and, for classification, the label set."""

    examples: dict[str, Examples]
    labels: list[str] = field(default_factory=list)


def require_length(config: Config, context: int | None) -> None:
    """Refuse rows longer than the model's context."""
    if context is not None and config.data.max_length > context:
        rule = f"the model has a context of {context} tokens"
        raise InputError(f"data.max_length={config.data.max_length}", rule, f"Use {context} or less")


def read_splits(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    model_stops: Sequence[int] = (),
    names: Sequence[str] = SPLITS,
) -> Splits:
    """Read, divide and tokenize.

    Args:
        context: positions that the model has; None where it sets no limit.
        model_stops: ids that end an answer by the model's own generation config.
        names: the splits wanted; others are neither read nor tokenized unless one of these is cut from them.

    Raises:
        InputError: a fault in a file or a row, an empty split, a row without a supervised token.
    """
    records = _read(config, names)
    labels = _labels(config, records.get("train"))
    records = {n: r for n, r in records.items() if n in names}
    examples: dict[str, Examples] = {}
    for name, rows in records.items():
        examples[name] = _tokenize(rows, tokenizer, config, labels, model_stops)
        if not len(examples[name]):
            raise InputError(f"data.{name}", f"the {name} split is empty", "Give rows, or another share")
    if config.data.retention is not None and "retention" in names:
        text = DataConfig(kind=Kind.text, text_unit=config.data.text_unit)
        rows = list(read_records(config.data.retention, "data.retention", text, "pretrain"))
        limit = min(context or RETENTION_TOKENS, RETENTION_TOKENS)
        examples["retention"] = documents(rows, tokenizer, limit)
        if not len(examples["retention"]):
            raise InputError(f"data.retention={config.data.retention}", "it holds no text", "Give a text file")
    return Splits(examples, labels)


def _read(config: Config, names: Sequence[str]) -> dict[str, list[Record]]:
    """Records by split, in the order train, validation, test; empty splits are refused."""
    data, objective = config.data, config.objective.name
    records: dict[str, list[Record]] = {}
    shares = {n: s for n, s in (("validation", data.validation_share), ("test", data.test_share)) if s}
    needed = {*names, "train"} if any(n in names for n in shares) else set(names)
    for name in ("train", "validation", "test"):
        source = getattr(data, name)
        if source is not None and name in needed:
            records[name] = list(read_records(source, f"data.{name}", data, objective))
            if not records[name]:
                raise InputError(f"data.{name}={source}", "the file holds no row", "Give a file with rows")
    if "train" in records and shares:
        total = len(records["train"])
        records["train"], parts = split_by_content(records["train"], shares)
        records |= parts
        for name, rows in {"train": records["train"], **parts}.items():
            if not rows:
                key = f"data.{name}_share={shares[name]}" if name in shares else "data.train"
                raise InputError(key, f"of {total} rows none falls to {name}", "Give more rows, or another share")
    return records


def _labels(config: Config, train: list[Record] | None) -> list[str]:
    """The label set: as given, or what occurs in the training rows, sorted."""
    if not config.objective.name.startswith("classify"):
        return []
    if not config.data.labels and train is None:
        raise InputError("data.labels", "the classes are not known without training rows", "Give data.labels=[...]")
    labels = config.data.labels or sorted({r.label for r in train or [] if r.label is not None})
    if len(set(labels)) != len(labels):
        raise InputError(f"data.labels={labels}", "a label stands twice", "Name each once")
    if len(labels) < 2:
        raise InputError(f"labels {labels}", "classification needs at least two", "Check data.columns.label")
    return list(labels)


def _tokenize(
    rows: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    labels: list[str],
    model_stops: Sequence[int],
) -> Examples:
    if labels:
        return labelled(rows, tokenizer, config, labels)
    if config.objective.name == "pretrain":
        return blocks(rows, tokenizer, config)
    return conversations(rows, tokenizer, config, model_stops)
