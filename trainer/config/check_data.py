"""The rules that the keys of the data keep."""

from __future__ import annotations

import math
from collections.abc import Callable

from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import Duplicates, HeldOut, Packing
from tritune.trainer.config.data import COLUMNS, ROLES, SPLIT_FILES, Check
from tritune.trainer.config.registry import reading_text
from tritune.trainer.config.schema import Config


def check_data(c: Config, rule: Callable[[bool, str, str], None], faults: list[str]) -> None:
    """The rules for what is read, and in which order it comes."""
    d = c.data
    rule(d.max_length >= 2, "data.max_length", "it must be at least 2 tokens. Use 2 or more")
    for key in ("validation", "test"):
        share = getattr(c.data, f"{key}_share")
        rule(0.0 <= share < 1.0, f"data.{key}_share", "it must be at least 0 and below 1. Use e.g. 0.1")
        rule(
            not (share and getattr(c.data, key)),
            f"data.{key}_share",
            f"data.{key} is given as well. Set one of the two",
        )
    rule(
        c.data.validation_share + c.data.test_share < 1.0,
        "data.validation_share",
        "with data.test_share nothing is left to train on. Their sum must stay below 1",
    )
    rule(
        d.held_out is not HeldOut.contiguous or d.group is None,
        "data.held_out",
        "the end of a file holds parts of groups, and data.group keeps each in one split. Leave out one of the two",
    )
    mappings = {"data.columns": d.columns} | {f"data.split_columns.{n}": m for n, m in d.split_columns.items()}
    mappings |= {f"data.sources.{name}.columns": source.columns for name, source in d.sources.items()}
    faults += [
        f"{key}.{name}: there is no such column here. Map one of {', '.join(COLUMNS)}"
        for key, mapping in mappings.items() for name in mapping if name not in COLUMNS
    ]  # fmt: skip
    faults += [
        f"data.split_columns.{name}: no such split has a file of its own. Use {', '.join(SPLIT_FILES)}; to train, data.columns"
        for name in d.split_columns if name not in SPLIT_FILES
    ]  # fmt: skip
    rule(not (d.train and d.sources), "data.train", "data.sources names the training rows as well. Give one of the two")
    rule(d.temperature > 0, "data.temperature", "weights are taken to the power 1 / temperature. Use a positive value")
    for name, source in d.sources.items():
        key = f"data.sources.{name}"
        for fault in (
            source.path is None and f"{key}.path: the source has no file. Give {key}.path=<file>",
            source.weight is not None and source.epochs is not None
            and f"{key}.weight={source.weight}: {key}.epochs is given as well. Set one of the two",
            not (source.weight is None or 0 < source.weight < math.inf)
            and f"{key}.weight={source.weight}: a share is positive. Leave the source out to give it none",
            not (source.epochs is None or 0 < source.epochs < math.inf)
            and f"{key}.epochs={source.epochs}: rows come at least once in a while. Use a positive number, e.g. 0.5",
            not 0 < source.loss_weight < math.inf
            and f"{key}.loss_weight={source.loss_weight}: a weight is positive. Leave the source out to give it none",
        ):  # fmt: skip
            if fault:
                faults.append(fault)
    if d.streaming:
        rule(
            c.train.max_steps is not None and c.train.epochs is None,
            "data.streaming",
            "a stream has no epoch. Give train.max_steps, and leave out train.epochs",
        )
        rule(
            c.checkpoint.every is not None,
            "data.streaming",
            "without epochs nothing says when to save. Give checkpoint.every=<steps>",
        )
        rule(
            not (d.validation_share or d.test_share),
            "data.streaming",
            "a split cannot be cut from rows that are not all read. Give data.validation=<file> and data.test=<file>",
        )
        rule(
            c.objective.learns is not Learns.text and d.duplicates is Duplicates.keep,
            "data.streaming",
            "blocks of text, and duplicates, need all rows. Leave it out, or use other settings",
        )
        rule(
            c.objective.learns is not Learns.labels or bool(d.labels),
            "data.streaming",
            "the classes cannot be collected from rows that are not all read. Give data.labels=[...]",
        )
        rule(
            len(d.sources) < 2 or all(s.weight is not None and s.epochs is None for s in d.sources.values()),
            "data.streaming",
            "nobody knows how many rows a stream has. Give each source a weight, and no epochs",
        )
    rule(0 <= d.stride < d.max_length, "data.stride", "it repeats a part of a block. Use a value below data.max_length")
    rule(
        d.stride == 0 or c.objective.learns is Learns.text,
        "data.stride",
        f"only objective={reading_text().name} cuts text into blocks. Leave it out",
    )
    rule(
        d.packing is Packing.none or c.objective.learns is not Learns.text,
        "data.packing",
        f"objective={c.objective.name} fills its blocks with text already. Use none",
    )
    rule(0 < d.similarity <= 1, "data.similarity", "it must be above 0 and at most 1. Use e.g. 0.8")
    rule(d.pack_window >= 1, "data.pack_window", "it must be at least 1 row. Use e.g. 16384")
    unknown = [r for r in d.train_on if r not in ROLES]
    rule(
        bool(d.train_on) and not unknown,
        "data.train_on",
        f"it names roles whose turns are trained: {', '.join(ROLES)}. Use e.g. [assistant]",
    )
    rule(c.cache.num_procs is None or c.cache.num_procs >= 1, "cache.num_procs", "it must be at least 1. Use 1 or more")
    strange = [name for name in c.audit.fail_on if name not in list(Check)]
    rule(not strange, "audit.fail_on", f"there is no finding {', '.join(strange)}. Choose from {', '.join(Check)}")
