"""From the data config to the tokenized splits of a run: which sources are read, how they are divided, what is cached."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import SPLITS, Config, ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import Duplicates, Kind, SpecialTokens
from tritune.trainer.config.data import DataConfig, data_of, held_out_sources, training_sources
from tritune.trainer.config.registry import code_of, reading_text
from tritune.trainer.data import remarks
from tritune.trainer.data.cache import build_once, cache_root, content_hash, key_of, recall, remember
from tritune.trainer.data.clean import near_groups
from tritune.trainer.data.encode import Conversations, Documents, Labelled
from tritune.trainer.data.encoded import Encoder
from tritune.trainer.data.entry import Entry
from tritune.trainer.data.examples import DataReport, Examples, joined, require_known_labels
from tritune.trainer.data.held_out import find_ends, is_contiguous
from tritune.trainer.data.pipeline import Piece, Source, cores, pieces
from tritune.trainer.data.records import hub_name, hub_version, source_files
from tritune.trainer.data.tables import REJECTS, Divider, TableFiles, require_columns, require_supervision
from tritune.trainer.data.tokenizing import plain_backend
from tritune.trainer.data.units import Units
from tritune.trainer.data.unread import KeyReader
from tritune.trainer.errors import InputError, UnreachableError, some_names
from tritune.trainer.model.tokenizer import adds_bos, stop_token_ids
from tritune.trainer.shown import shown

RETENTION_TOKENS = 2048  # a document of the retention text is cut here, or at the model's context if that is shorter
# Which of the data's keys decide how a source's rows are tokenized; the others choose among the rows or arrange them.
DECIDES = ("kind", "columns", "text_unit", "max_length", "overlong", "stride", "group", "duplicates", "similarity", "bad_rows",
            "unsupervised", "train_on", "last_turn_only", "turns", "special_tokens", "ignore", "system_turn",
            "held_out")  # fmt: skip


@dataclass
class Splits:
    """Tokenized rows by split (train, validation, test, retention), for classification the label set, the names of the
    sources that training rows come from, by their numbers in `Examples.sources`, by config key the cache's folder of each
    source, where `rejects.jsonl` says what was left out, and the config keys of those of which the end of each file is held
    out."""

    examples: dict[str, Examples]
    labels: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    at_ends: list[str] = field(default_factory=list)

    def rejects(self) -> Iterator[dict[str, str]]:
        """Every row that was left out: place, fate, why, and the config key of its source."""
        for key, folder in self.folders.items():
            with (folder / REJECTS).open(encoding="utf-8") as file:
                for line in file:
                    yield {**json.loads(line), "source": key}


@dataclass(frozen=True)
class Watch:
    """Who is told while rows are tokenized: `notify` of the source and what was read so far, `beat` that there is life, `say`
    of what the user did not ask for."""

    notify: Callable[[str, int, int], None] = lambda name, rows, tokens: None
    beat: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda text: print(shown(text), file=sys.stderr, flush=True)


def require_length(data: DataConfig, context: int | None, taken: int = 0) -> None:
    """Refuse rows longer than the model's context, which is `context` beside what is `taken` by the method."""
    if context is not None and data.max_length > context:
        rule = f"the model has a context of {context + taken} tokens" + f", and the method takes {taken}" * bool(taken)
        raise InputError(f"data.max_length={data.max_length}", rule, f"Use {context} or less")


def read_splits(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    model_stops: Sequence[int] = (),
    names: Sequence[str] = SPLITS,
    watch: Watch | None = None,
) -> Splits:
    """Read, divide and tokenize, or take from the cache what was tokenized before.

    Args:
        context: positions that the model has; None where it sets no limit.
        model_stops: ids that end an answer by the model's own generation config.
        names: the splits wanted; others are neither read nor tokenized unless one of these is cut from them.

    Raises:
        InputError: a fault in a file or a row, an empty split, a row without a supervised token.
    """
    data, objective = config.data, config.objective
    reader = Reader(
        config, tokenizer, stop_token_ids(tokenizer, list(model_stops)), watch or Watch(), tokenizer_key(tokenizer)
    )
    encoder, block = encoder_of(data, objective, tokenizer, reader.stops)
    shares = {n: s for n, s in (("validation", data.validation_share), ("test", data.test_share)) if s}
    sources = training_sources(data)
    found: dict[str, list[Entry]] = {}
    if not data.streaming and ("train" in names or any(n in names for n in shares)):
        for path, key in sources.values():
            for name, entry in reader.entries(path, key, data_of(data, key), objective, encoder, shares, block).items():
                found.setdefault(name, []).append(entry)
    for name, (path, key) in held_out_sources(data).items():
        if name in names:
            found[name] = [reader.entries(path, key, data_of(data, key), objective, encoder, {}, block)["train"]]
    labels = _labels(data, objective, found.get("train"))
    _say_target(found.get("train", []), labels, reader.watch)
    examples: dict[str, Examples] = {
        n: _examples(found[n], labels, objective.documents)
        for n in ("train", "validation", "test")
        if n in found and n in names
    }
    if data.retention is not None and "retention" in names:
        limit = min(context or RETENTION_TOKENS, RETENTION_TOKENS)
        text = replace(retention_data(data), max_length=limit, bad_rows=data.bad_rows)
        keep = data.special_tokens is SpecialTokens.keep
        documents = Documents(tokenizer, separate=False, limit=limit, keep=keep)
        entries = reader.entries(data.retention, "data.retention", text, reading_text(), documents, {}, None)
        examples["retention"] = _examples([entries["train"]], [])
    for name, split in examples.items():  # of all sources together, as the audit counts them
        if objective.learns is Learns.answers and name != "retention":
            require_supervision({"train": split.report}, data)
    return Splits(examples, labels, list(sources), reader.folders, reader.at_ends)


@dataclass(frozen=True)
class Reader:
    """What the sources of one run have in common."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    watch: Watch
    tokenizer_key: str
    folders: dict[str, Path] = field(default_factory=dict)
    at_ends: list[str] = field(default_factory=list)

    def entries(
        self, path: str, key: str, data: DataConfig, objective: ObjectiveConfig, encoder: Encoder, shares: dict[str, float],
        block: int | None,
    ) -> dict[str, Entry]:  # fmt: skip
        """The splits of one source, from the cache or built into it."""
        root = cache_root(self.config.cache.dir)
        source = source_of(path, key, data, objective, encoder)
        at_ends = bool(shares) and is_contiguous(path, key, data, objective)
        parts = {
            "source": fingerprint(path, key, root, self.watch),
            "tokenizer": self.tokenizer_key,
            "data": {name: str(getattr(data, name)) for name in DECIDES},
            "objective": [objective.name, self.config.objective.label_prompt, *code_of(objective)],
            "encoder": [type(encoder).__name__, block, getattr(encoder, "limit", None), getattr(encoder, "end", None)],
            "shares": shares,
            "stops": list(self.stops),
        }

        def build(folder: Path) -> dict[str, Any]:
            source.settle()
            if at_ends:
                source.ends = find_ends(path, key, data, objective, shares, self.watch.beat)
            seen: set[str] = set()
            rows = tokens = 0
            with TableFiles(folder, ("train", *shares)) as files:
                near = data.duplicates is Duplicates.drop_near
                groups = near_groups(source, data.similarity, self.watch.beat) if near else {}
                divider = Divider(shares, data, block, files.write, files.reject, groups)
                for piece in pieces(source, self.config.cache.num_procs or cores()):
                    divider.take(piece)
                    if isinstance(piece, Piece):
                        seen |= piece.seen
                        rows, tokens = rows + len(piece.batch), tokens + len(piece.batch["ids"].flatten())
                        self.watch.beat()
                        self.watch.notify(key, rows, tokens)
                divider.end()
                if fingerprint(path, key, root, self.watch) != parts["source"]:
                    raise InputError(f"{key}={path}", "it changed while it was read", "Start again once it is whole")
                report, layout = divider.sinks["train"].report, source.layout
                report.columns, report.others = layout.columns, {n: list(o) for n, o in layout.others.items()}
                require_rows(source, seen, {n: sink.report for n, sink in divider.sinks.items()}, shares)
                return {"made_of": parts, "tables": files.finish(divider.sinks)}

        found = build_once(root, key_of(parts), build, self.watch.beat, self.watch.say)
        self.folders[key] = root / key_of(parts)
        if at_ends:
            self.at_ends.append(key)
        for entry in found.values():
            remarks.require_rendered(entry.report.remarks, entry.report.rows, self.config.data)
        if objective.learns is Learns.answers and self.config.data.require_stop_token:
            require_stop_token([entry.report for entry in found.values()], self.tokenizer, self.stops, data)
        return found


def require_stop_token(
    reports: Sequence[DataReport], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], data: DataConfig
) -> None:
    """Refuse splits in which no row trains a stop token.

    Raises:
        InputError: the model would not learn to end an answer.
    """
    if not all(report.stop_rows for report in reports):
        rule = "no stop token is trained in any row, so the model would not learn to end an answer"
        cut = any(remarks.Kind.truncated_answers in report.remarks for report in reports)
        remedy = (
            f"{f'Answers are cut: raise data.max_length={data.max_length}. Else u' if cut else 'U'}se a template whose"
        )
        remedy += " answers end with one, or data.require_stop_token=false"
        raise InputError(f"stop tokens {tokenizer.convert_ids_to_tokens(sorted(stops))}", rule, remedy)


def require_rows(source: Source, seen: set[str], reports: dict[str, DataReport], shares: dict[str, float]) -> None:
    """Refuse a source that gives nothing to train or to score on.

    Raises:
        InputError: it holds no row, or lacks a column that the config names; a split of it is empty.
    """
    rows, lost = sum(r.rows for r in reports.values()), reports["train"]
    if source.kind is None:
        what = f"none of its {lost.bad:,} rows can be read" if lost.bad else "the file holds no row"
        raise InputError(f"{source.key}={source.path}", what, "Give a file with rows")
    require_columns(source, seen)
    if source.objective.learns is Learns.answers:
        require_supervision(reports, source.data, None)
    for name, report in reports.items():
        if not report.rows:
            key = f"data.{name}_share={shares[name]}" if name in shares else f"{source.key}={source.path}"
            raise InputError(key, f"of {rows:,} rows none falls to {name}", _more(source, name, shares))


def _more(source: Source, name: str, shares: dict[str, float]) -> str:
    """What gives a split rows that has none."""
    if shares and source.ends is not None:
        return "Give more rows, another share, or data.held_out=hash, which divides the rows by their content"
    if not shares or source.data.group:
        return "Give more rows, or another share"
    return "Give more rows, another share, or data.held_out=contiguous, which holds out the end of each file"


def encoder_of(
    data: DataConfig, objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> tuple[Encoder, int | None]:
    """The encoder of the objective, and the length of the blocks that its text is cut into."""
    keep = data.special_tokens is SpecialTokens.keep
    match objective.learns:
        case Learns.labels:
            return Labelled(tokenizer, data, objective), None
        case Learns.text:
            return Documents(tokenizer, separate=True, keep=keep), data.max_length
        case Learns.answers:
            asked = replace(data, last_turn_only=True) if objective.documents > 1 else data
            return Conversations(tokenizer, asked, stops), None


def source_of(path: str, key: str, data: DataConfig, objective: ObjectiveConfig, encoder: Encoder) -> Source:
    """A source with its encoder, and with what finds out which keys of messages are rendered."""
    template = encoder.template if isinstance(encoder, Conversations) else None
    encoder = Units(encoder, objective.documents_of, objective.documents) if objective.documents > 1 else encoder
    return Source(path, key, data, objective, encoder, keys=None if template is None else KeyReader(template))


def retention_data(data: DataConfig) -> DataConfig:
    """How the retention text is read: as text, with a mapping of its own."""
    columns = data.split_columns.get("retention", {})
    mapping = {"retention": columns} if columns else {}
    return DataConfig(
        kind=Kind.text,
        text_unit=data.text_unit,
        columns=columns,
        split_columns=mapping,
        special_tokens=data.special_tokens,
    )


def _examples(entries: list[Entry], labels: list[str], unit: int = 1) -> Examples:
    report = joined([e.report for e in entries])
    guards = [e.guard for e in entries]
    examples = Examples(
        [e.table for e in entries], labels, [e.digest for e in entries], report, guards=guards, unit=unit
    )
    require_known_labels(examples, labels)
    return examples


def _labels(data: DataConfig, objective: ObjectiveConfig, train: list[Entry] | None) -> list[str]:
    """The label set: as given, or what occurs in the training rows, sorted."""
    if objective.learns is not Learns.labels:
        return []
    if not data.labels and train is None:
        raise InputError("data.labels", "the classes are not known without training rows", "Give data.labels=[...]")
    found = {label for e in train or [] for label in pc.unique(e.table["label"]).to_pylist() if label is not None}
    labels = data.labels or sorted(found)
    if len(set(labels)) != len(labels):
        raise InputError(f"data.labels={labels}", "a label stands twice", "Name each once")
    if len(labels) < 2:
        raise InputError(f"labels {labels}", "classification needs at least two", "Check data.columns.label")
    return list(labels)


def _say_target(entries: list[Entry], labels: list[str], watch: Watch) -> None:
    """Which column the classes are read from, where others could have been meant."""
    report = joined([entry.report for entry in entries])
    if labels and (others := report.others.get("label")):
        named = f"data.columns.label={others[0]} reads {'that' if len(others) == 1 else 'another'}"
        watch.say(
            f"data      labels: {len(labels):,} classes in column {report.columns['label']}, beside {some_names(others)}; {named}"
        )


def fingerprint(path: str, key: str, root: Path, watch: Watch) -> list[Any]:
    """What a source holds: for files their content, for the hub what `datasets` calls the same version."""
    if path.startswith("hf://"):
        return [path, _last_version(path, root, watch)]
    return [path, [[str(f), content_hash(f, root, watch.beat)] for f in source_files(path, key)]]


def _last_version(path: str, root: Path, watch: Watch) -> str:
    """The hub's version of a source, remembered for machines that cannot reach it: their tokens may be in the cache."""
    note = root / "hub" / key_of(path)
    try:
        version = hub_version(path)
    except UnreachableError as error:
        if (known := recall(note)) is None:
            raise
        version = known
        watch.say(f"data      {path}: {error.rule}; taking its version {version[:12]}, the last that was seen here")
        return version
    local = Path(hub_name(path)[0]).exists()  # one that is gone is no hub that is down
    if not local and recall(note) != version:
        remember(root, note, version)
    return version


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything in a tokenizer that decides what a text becomes, and of the libraries that do it."""
    specials = {
        n: str(t) for n, t in tokenizer.special_tokens_map.items() if n != "pad_token"
    }  # which this run may choose
    versions = [tokenizers.__version__, transformers.__version__, jinja2.__version__]
    return key_of([plain_backend(tokenizer).to_str(), specials, adds_bos(tokenizer), tokenizer.chat_template, versions])
