"""The rules that configuration values must keep, where no file and no model is needed to see it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import Enum
from typing import Any

from tritune.trainer.config.axes import CLASSIFICATION, Head, Learns, MethodConfig, Metric
from tritune.trainer.config.backends import FsdpConfig, HsdpConfig, Offload, ZeroConfig, hsdp_shards
from tritune.trainer.config.check_data import check_data
from tritune.trainer.config.choices import Activations, Dtype, Form
from tritune.trainer.config.launch import check_launch
from tritune.trainer.config.registry import saying_labels
from tritune.trainer.config.schema import SPLITS, Config, TrainConfig, names, schemas


def check(config: Config, world_size: int | None = None, training: bool = True) -> list[str]:
    """Return every fault of `config` that needs no file and no model to be seen, as `key=value: rule. Remedy` lines.

    Args:
        world_size: the number of ranks, where it is known already.
        training: whether the run trains; a model that is only read needs no data and no end.
    """
    c, faults = config, []

    def rule(holds: bool, key: str, text: str) -> None:
        if not holds:
            value: Any = c
            for part in key.split("."):
                value = getattr(value, part)
            faults.append(f"{key}={value.value if isinstance(value, Enum) else value}: {text}")

    rule(
        bool(c.model.path) != bool(c.model.config),
        "model.path",
        "a model is either pretrained or made from a config. Give model.path=<hub id or folder>, or model=tiny",
    )
    rule(
        not c.model.config or c.model.tokenizer is not None,
        "model.tokenizer",
        "a model from a config has no tokenizer of its own. Give model.tokenizer=<folder>, or bytes (built in)",
    )
    rule(
        not training or c.model.adapter is None,
        "model.adapter",
        "an adapter is evaluated and generates; a run trains one of its own, on a whole model. Leave it out",
    )
    rule(
        c.model.adapter is None or bool(c.model.path),
        "model.adapter",
        "it goes on a base. Give model.path=<its base>, or the adapter alone as model.path",
    )
    has_rows = c.data.train is not None or bool(c.data.sources)
    rule(not training or has_rows, "data.train", "there is nothing to train on. Give data.train=<file>")
    rule(0 <= c.seed < 2**63, "seed", "a seed is a whole number from 0 to 2^63 - 1. Use e.g. 0")
    check_data(c, rule, faults)
    c.method.check(rule)
    c.objective.check(rule)
    rule(
        c.objective.learns is not Learns.text or c.objective.documents == 1,
        "objective.name",
        "text is joined and cut into blocks, which no unit of several documents would survive. Let it learn answers or labels",
    )
    rate = c.optim.lr
    rule(
        rate is None or 0 < rate < math.inf,
        "optim.lr",
        "a learning rate is positive and finite. Use e.g. 1e-4, or null",
    )
    rule(c.optim.eps > 0, "optim.eps", "it must be above 0: it keeps a division from zero. Use e.g. 1e-8")
    rule((c.optim.warmup_steps or 0) >= 0, "optim.warmup_steps", "it must be at least 0. Use 0 or more")
    rule(
        len(c.optim.betas) == 2 and all(0 <= b < 1 for b in c.optim.betas),
        "optim.betas",
        "AdamW has two betas in [0, 1). Use e.g. [0.9,0.999]",
    )
    rule(c.optim.weight_decay >= 0, "optim.weight_decay", "it must be at least 0. Use 0 to turn it off")
    rule(
        c.optim.max_grad_norm > 0,
        "optim.max_grad_norm",
        "clipping needs a positive norm. Use a large value, 1e9, for none",
    )
    for key in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        rule(0.0 <= getattr(c.optim, key) <= 1.0, f"optim.{key}", "it must be from 0 to 1. Use e.g. 0.1")
    rule(c.train.batch_size >= 1, "train.batch_size", "it must be at least 1 sequence. Use 1 or more")
    rule(
        c.train.micro_batch_size is None or 1 <= c.train.micro_batch_size <= c.train.batch_size,
        "train.micro_batch_size",
        f"it splits train.batch_size={c.train.batch_size}. Use a value from 1 to that",
    )
    for key in ("epochs", "max_steps"):
        count = getattr(c.train, key)
        rule(count is None or count >= 1, f"train.{key}", "it must be at least 1. Use 1 or more")
    rule(
        not training or c.train.epochs is not None or c.train.max_steps is not None,
        "train.max_steps",
        "the run has no end. Give train.max_steps or train.epochs, at least 1",
    )
    rule(c.train.compile_seconds > 0, "train.compile_seconds", "it must be above 0 seconds. Use e.g. 900")
    rule(c.kernels.loss_chunk_tokens >= 1, "kernels.loss_chunk_tokens", "it must be at least 1. Use e.g. 4096")
    rule(c.backend.timeout_seconds >= 1, "backend.timeout_seconds", "it must be at least 1 second. Use 1 or more")
    rule(c.backend.join_seconds > 0, "backend.join_seconds", "it must be above 0 seconds. Use e.g. 20")
    check_launch(c.launch, rule)
    metrics = metrics_of(c)
    rule(
        c.evaluation.metric in metrics,
        "evaluation.metric",
        f"objective={c.objective.name} reports {', '.join(metrics)}. Choose one of these",
    )
    for group, known in names().items():
        node = getattr(c, group)
        schema = schemas()[group].get(node.name)
        rule(
            node.name in known and (schema is None or type(node) is schema),
            f"{group}.name",
            f"the name follows from the group's option, {', '.join(known)}. Write {group}={node.name}, or in a YAML, "
            f"among its defaults, `override /{group}: {node.name}`",
        )
    rule(
        not c.data.retention or c.objective.head is Head.language_model,
        "data.retention",
        f"it is scored as text, and objective={c.objective.name} replaces the language-model head. Use "
        f"{saying_labels().name}, or leave it out",
    )
    rule(c.train.log_every >= 1, "train.log_every", "it must be at least 1 step. Use 1 or more")
    rule(c.train.max_nonfinite >= 1, "train.max_nonfinite", "it must be at least 1 step. Use 1 or more")
    rule(
        c.train.patience is None or c.train.patience >= 1,
        "train.patience",
        "it must be at least 1 evaluation. Use 1 or more",
    )
    for key in ("evaluation.every", "checkpoint.every"):
        every = getattr(getattr(c, key.split(".")[0]), "every")  # noqa: B009
        rule(
            every is None or every >= 1, key, "an interval is at least one step. Use 1 or more, or null for each epoch"
        )
    rule(c.checkpoint.keep_last >= 1, "checkpoint.keep_last", "the newest checkpoint is always kept. Use 1 or more")
    rule(c.evaluation.batch_size >= 1, "evaluation.batch_size", "it must be at least 1 row. Use 1 or more")
    _check_results(c, rule)
    _check_abstention(c, rule, training)
    _check_backend(c, rule, world_size)
    rule(c.verify.steps >= 2, "verify.steps", "it must be at least 2: a curve has two steps. Use 2 or more")
    rule(c.verify.parameters_every >= 1, "verify.parameters_every", "it must be at least 1 step. Use 1 or more")
    rule(
        c.verify.orders >= 2,
        "verify.orders",
        "it must be at least 2: a spread is taken over several orders. Use 2 or more, 10 for a proof",
    )
    rule(
        c.verify.kill_at is None or 1 <= c.verify.kill_at < c.verify.steps,
        "verify.kill_at",
        f"the run has {c.verify.steps} steps and is killed before its end. Use a step from 1 to {c.verify.steps - 1}",
    )
    rule(c.verify.to_procs is None or c.verify.to_procs >= 1, "verify.to_procs", "it must be at least 1. Use 1 or more")
    has_validation = bool(c.data.validation or c.data.validation_share)
    for key in ("patience", "use_best"):
        rule(
            not getattr(c.train, key) or has_validation,
            f"train.{key}",
            "the best step is chosen on a validation split, and there is none. Give data.validation or "
            "data.validation_share",
        )
    if world_size is not None:
        rule(
            not (c.backend.name == "single" and world_size > 1),
            "backend.name",
            f"{world_size} processes were started. Use backend=ddp, or start one process",
        )
        accumulation = derived_accumulation(c.train, world_size)
        rule(
            c.train.accumulation in (None, accumulation),
            "train.accumulation",
            f"train.batch_size={c.train.batch_size} over {world_size} rank(s) in micro-batches of "
            f"{c.train.micro_batch_size} makes {accumulation}. Leave it out: it is derived",
        )
    return faults


def _check_results(c: Config, rule: Callable[[bool, str, str], None]) -> None:
    """The rules for what becomes of a model: scores, answers, files."""
    unknown = [s for s in c.evaluation.splits if s not in SPLITS]
    rule(not unknown, "evaluation.splits", f"there is no split {', '.join(unknown)}. Choose from {', '.join(SPLITS)}")
    rule(c.evaluation.samples >= 0, "evaluation.samples", "it must be at least 0 rows. Use 0 or more")
    choices = c.evaluation.choices
    rule(
        not choices or c.objective.learns is Learns.answers,
        "evaluation.choices",
        f"answers are chosen among where answers are learnt, and objective={c.objective.name} learns "
        f"{c.objective.learns.value}. Leave it out",
    )
    clash = next((a for a in choices for b in choices if a is not b and b.startswith(a)), None)
    rule(
        clash is None and len(choices) != 1 and "" not in choices,
        "evaluation.choices",
        "two or more beginnings of an answer are needed, none of which begins another",
    )
    rule(
        c.checkpoint.step is None or c.checkpoint.step >= 1,
        "checkpoint.step",
        "it must be at least 1: steps are counted from 1. Use 1 or more",
    )
    rule(c.export.shard_gb > 0, "export.shard_gb", "it must be above 0. Use e.g. 5")
    method, form = c.method, c.export.form
    rule(
        form is Form.auto or (form is Form.full) != method.freezes_base,
        "export.form",
        f"method={method.name} trains {_trained(method)}",
    )
    rule(
        form is not Form.adapter or method.writes_adapter or not method.freezes_base,
        "export.form",
        f"PEFT's layout has no adapter of method={method.name}. Use merged",
    )
    rule(
        form is not Form.merged or method.merges,
        "export.form",
        f"what method={method.name} trains is beside the weights, and cannot be merged into them. Use adapter",
    )
    rule(
        method.merges or not c.model.config or not c.export.enabled,
        "export.enabled",
        f"a base with random weights is nowhere to be loaded, and method={method.name} cannot be merged into it. Use false",
    )
    rule(
        c.export.form is not Form.adapter or not c.model.config,
        "export.form",
        "a base with random weights is nowhere to be loaded, and the adapter with it. Use merged",
    )
    rule(c.generate.max_new_tokens >= 1, "generate.max_new_tokens", "it must be at least 1 token. Use 1 or more")
    rule(c.generate.num_samples >= 1, "generate.num_samples", "it must be at least 1. Use 1 or more")
    rule(
        c.generate.num_samples == 1 or c.generate.temperature > 0,
        "generate.num_samples",
        "without chance every answer is the same. Give generate.temperature, e.g. 0.8",
    )
    rule(
        0 <= c.generate.temperature < math.inf,
        "generate.temperature",
        "it must be at least 0 and finite. Use 0 for the likeliest token",
    )
    rule(0 < c.generate.top_p <= 1, "generate.top_p", "it must be above 0 and at most 1. Use e.g. 0.95")
    rule(c.generate.top_k >= 0, "generate.top_k", "it must be at least 0. Use 0 for no limit")
    rule(c.generate.batch_size >= 1, "generate.batch_size", "it must be at least 1 row. Use 1 or more")


def _check_abstention(c: Config, rule: Callable[[bool, str, str], None], training: bool) -> None:
    """The rules for a classifier that may abstain."""
    e = c.evaluation
    rule(e.abstain is None or 0 < e.abstain < 1, "evaluation.abstain", "it must be above 0 and below 1. Use e.g. 0.95")
    rule(
        e.abstain is None or c.objective.learns is Learns.labels,
        "evaluation.abstain",
        f"a classifier may abstain, and this is {c.objective.name}. Leave it out",
    )
    held_out = bool(c.data.validation or c.data.validation_share) and "validation" in e.splits
    rule(
        not training or e.abstain is None or held_out,
        "evaluation.abstain",
        "the threshold is chosen on a validation split that is scored in the end. Give data.validation or "
        "data.validation_share, and name validation in evaluation.splits",
    )
    rule(
        e.abstain_below is None or 0 <= e.abstain_below <= 1,
        "evaluation.abstain_below",
        "a probability from 0, which answers every row, to 1. Use e.g. 0.8",
    )
    rule(
        not training or e.abstain_below is None,
        "evaluation.abstain_below",
        "a run chooses its threshold by evaluation.abstain=<accuracy>; this key is for reading a model. Leave it out",
    )


def _check_backend(c: Config, rule: Callable[[bool, str, str], None], world_size: int | None) -> None:
    """What each backend can do, and with what."""
    b, exact = c.backend, c.model.dtype is Dtype.float64
    keeps = c.train.activation_checkpointing
    rule(
        not c.train.activation_offload or keeps is Activations.full,
        "train.activation_offload",
        "it moves what full checkpointing keeps, a layer's input. Set train.activation_checkpointing=full",
    )
    rule(
        not (exact and keeps is not Activations.none),
        "train.activation_checkpointing",
        "model.dtype=float64 exists for proofs and computes nothing again. Use none, or float32",
    )
    rule(
        not (exact and c.train.compile),
        "train.compile",
        "model.dtype=float64 steps in where a model narrows to float32, which no compiled layer does. Use float32",
    )
    rule(
        not (c.train.activation_offload and c.train.compile),
        "train.activation_offload",
        "a compiled layer settles by itself what it keeps, and where. Set train.compile=false",
    )
    if isinstance(b, ZeroConfig):
        rule(not exact, "model.dtype", "DeepSpeed keeps no float64 masters. Use backend=fsdp or ddp, or float32")
        rule(
            not (c.train.compile and b.name == "zero3"),
            "train.compile",
            "ZeRO-3 gathers parameters in hooks inside a layer, where a compiled layer has none. Use backend=fsdp or zero2",
        )
        rule(
            b.offload is not Offload.all or b.name == "zero3",
            "backend.offload",
            f"{b.name} keeps all parameters on each rank to compute with. Use optimizer, or backend=zero3",
        )
        rule(
            b.bucket_elements >= 2 and b.bucket_elements % 2 == 0,
            "backend.bucket_elements",
            "DeepSpeed aligns buckets to two elements. Use an even number from 2, e.g. 50000000",
        )
        rule(b.persistence_elements >= 0, "backend.persistence_elements", "it must be at least 0. Use 0 for none")
    if isinstance(b, FsdpConfig):
        rule(b.prefetch >= 0, "backend.prefetch", "it must be at least 0 layers. Use 0 for none")
    if isinstance(b, HsdpConfig) and world_size is not None:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        rule(
            hsdp_shards(b, world_size, local_size) is not None,
            "backend.shards",
            f"{world_size} ranks cannot be split into equal groups of it, or of several ranks each. Give a divisor of "
            f"{world_size}, use another number of processes, or backend=fsdp",
        )


def metrics_of(config: Config) -> dict[str, Metric]:
    """The figures that evaluation reports, by name."""
    return {**config.objective.metrics, **(CLASSIFICATION if config.evaluation.choices else {})}


def derived_accumulation(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per rank and optimizer step."""
    per_rank = -(-train.batch_size // world_size)
    return -(-per_rank // min(train.micro_batch_size or per_rank, per_rank))


def _trained(method: MethodConfig) -> str:
    """What a method trains, and the forms that it is exported in."""
    if not method.freezes_base:
        return "the whole model: full"
    return "an adapter: adapter or merged" if method.merges else "an adapter: adapter"
