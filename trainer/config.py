"""The configuration tree: one dataclass a group, every key with its meaning, unit and default.

`trainer/compose.py` turns Hydra overrides into a `Config`; past that edge there is no DictConfig and no `.get`.
`check()` holds the rules that cross keys and returns every fault it finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore


class Dtype(str, Enum):
    """What forward and backward compute in. Master weights and moments are never below float32."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


class Attention(str, Enum):
    sdpa = "sdpa"
    eager = "eager"


class Kind(str, Enum):
    """What a row of the data is; `auto` reads it off the columns."""

    auto = "auto"
    messages = "messages"
    prompt_response = "prompt_response"
    text = "text"
    text_label = "text_label"


class TextUnit(str, Enum):
    """What one document of a plain-text file is."""

    file = "file"
    paragraph = "paragraph"
    line = "line"


class Unsupervised(str, Enum):
    """What happens to a row in which no token would be trained."""

    refuse = "refuse"
    drop = "drop"


class Schedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Bias(str, Enum):
    """Which biases LoRA trains: none, every one of the model, or those of the layers it adapts (PEFT's meanings)."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class Resume(str, Enum):
    """`auto` continues the run in `run.dir` if there is one, `require` refuses to start a new one, `never` the reverse."""

    auto = "auto"
    require = "require"
    never = "never"


class Keep(str, Enum):
    last = "last"
    best = "best"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class ModelConfig:
    path: str | None = None  # hub id or local folder of a pretrained model
    revision: str | None = None  # branch, tag or commit on the hub
    config: dict[str, Any] = field(default_factory=dict)  # instead of `path`: an architecture with random weights
    tokenizer: str | None = None  # hub id, folder, or "bytes" (built in); default: `path`
    dtype: Dtype = Dtype.float32
    attention: Attention = Attention.sdpa
    chat_template: str | None = None  # a Jinja file or "chatml"; default: the tokenizer's own
    pad_token: str | None = None  # default: the tokenizer's own, unless it is a stop token
    add_tokens: list[str] = field(default_factory=list)  # new tokens; embeddings are resized


@dataclass
class DataConfig:
    train: str | None = None  # .jsonl .csv .parquet .txt, a datasets folder, or hf://name[/config]:split
    validation: str | None = None
    test: str | None = None
    retention: str | None = None  # text of the base model's own domain: scored before and after, to show forgetting
    validation_share: float = 0.0  # cut from `train` by content hash, where `validation` is not given
    test_share: float = 0.0
    kind: Kind = Kind.auto
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the file's: prompt: instruction, label: category
    text_unit: TextUnit = TextUnit.paragraph
    max_length: int = 512  # tokens per row; pretraining cuts the text into blocks of this length
    unsupervised: Unsupervised = Unsupervised.refuse
    require_stop_token: bool = True  # refuse chat data in which no stop token is ever trained
    labels: list[str] = field(default_factory=list)  # classification: the label set; default: those of `train`


@dataclass
class MethodConfig:
    name: str = "full"


@dataclass
class LoraConfig(MethodConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    name: str = "lora"
    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # suffixes or globs of linear layers
    exclude: list[str] = field(default_factory=list)
    bias: Bias = Bias.none
    modules_to_save: list[str] = field(default_factory=list)  # trained whole and saved with the adapter


@dataclass
class ObjectiveConfig:
    name: str = "sft"


@dataclass
class ClassifyTokenConfig(ObjectiveConfig):
    name: str = "classify_token"
    prompt: str = "{text}\nLabel:"  # what the model reads before it says the label's one token


@dataclass
class OptimConfig:
    name: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01  # not on biases, norms and embeddings
    max_norm: float = 1.0  # gradient clipping
    schedule: Schedule = Schedule.cosine
    warmup_ratio: float = 0.03  # share of all steps
    warmup_steps: int | None = None  # instead of the share
    decay_ratio: float = 0.2  # wsd: share of all steps spent going down
    min_lr_ratio: float = 0.0  # the schedule ends at lr x this


@dataclass
class TrainConfig:
    batch_size: int = 32  # sequences (or blocks) per optimizer step over all ranks; it defines the run
    micro_batch_size: int | None = None  # sequences per forward on one rank; only splits the batch
    accumulation: int | None = None  # derived; refused if it disagrees
    epochs: int | None = None
    max_steps: int | None = None  # the earlier of the two ends the run
    max_nonfinite: int = 3  # steps in a row with a NaN or infinite gradient before the run fails
    log_every: int = 1
    deterministic: bool = False  # refuse nondeterministic GPU kernels
    patience: int | None = None  # evaluations without improvement before stopping early
    use_best: bool = False  # test and export the best checkpoint instead of the last


@dataclass
class EvaluationConfig:
    every: int | None = None  # steps; default: once per epoch
    batch_size: int = 64
    metric: str = "loss"  # of the validation split; picks the best checkpoint
    base: bool = True  # score the untouched model too, for base against tuned


@dataclass
class CheckpointConfig:
    every: int | None = None  # steps; default: with each evaluation
    keep_last: int = 2
    export: bool = True  # write the result in Hugging Face's or PEFT's layout at the end


@dataclass
class BackendConfig:
    name: str = "auto"
    device: Device = Device.auto
    timeout_seconds: int = 1800  # a collective that waits longer fails the run


@dataclass
class KernelsConfig:
    name: str = "auto"
    loss_chunk_tokens: int = 4096  # logits are made for this many tokens at a time, never stored whole


@dataclass
class RunConfig:
    dir: str | None = None  # default: runs/<experiment>-<time>
    resume: Resume = Resume.auto


@dataclass
class LaunchConfig:
    num_procs: int | None = None  # processes on this machine; default: one per GPU, else one


@dataclass
class Config:
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


# Keys that decide what the loss curve is. A run resumed with another value of one of them would be another run.
IDENTITY = ("seed", "model", "data", "method", "objective", "optim", "train.batch_size", "train.epochs", "train.max_steps")

SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"hub": ModelConfig},
    "method": {"full": MethodConfig, "lora": LoraConfig},
    "objective": {
        "pretrain": ObjectiveConfig,
        "sft": ObjectiveConfig,
        "classify": ObjectiveConfig,
        "classify_token": ClassifyTokenConfig,
    },
    "optim": {"adamw": OptimConfig},
    "backend": {"auto": BackendConfig},
    "kernels": {"auto": KernelsConfig},
}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore, under `<group>/schema_<name>`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"schema_{name}", node=schema)


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Return every fault of `config` that needs no file and no model to be seen, as `key=value: rule. Remedy` lines.

    `world_size` is the number of ranks, where it is known already.
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
    rule(c.data.train is not None, "data.train", "there is nothing to train on. Give data.train=<file>")
    rule(c.data.max_length >= 2, "data.max_length", "a row needs at least 2 tokens. Use 2 or more")
    for key in ("validation", "test"):
        share = getattr(c.data, f"{key}_share")
        rule(0.0 <= share < 1.0, f"data.{key}_share", "a share lies in [0, 1). Use e.g. 0.1")
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
    if isinstance(c.method, LoraConfig):
        rule(c.method.rank >= 1, "method.rank", "a rank is at least 1. Common values are 8 to 64")
        rule(0.0 <= c.method.dropout < 1.0, "method.dropout", "a dropout rate lies in [0, 1). Use e.g. 0.05")
        rule(bool(c.method.targets), "method.targets", "no layer is named. Use [all-linear] or name patterns")
    if isinstance(c.objective, ClassifyTokenConfig):
        rule("{text}" in c.objective.prompt, "objective.prompt", "the row's text has no place. Write {text} where it goes")
    rule(c.optim.lr > 0, "optim.lr", "a learning rate is positive. Use e.g. 1e-4")
    rule(
        len(c.optim.betas) == 2 and all(0 <= b < 1 for b in c.optim.betas),
        "optim.betas",
        "AdamW has two betas in [0, 1). Use e.g. [0.9,0.999]",
    )
    rule(c.optim.weight_decay >= 0, "optim.weight_decay", "a decay is not negative. Use 0 to turn it off")
    rule(c.optim.max_norm > 0, "optim.max_norm", "clipping needs a positive norm. Use a large value, 1e9, for none")
    for key in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        rule(0.0 <= getattr(c.optim, key) <= 1.0, f"optim.{key}", "a share lies in [0, 1]. Use e.g. 0.1")
    rule(c.train.batch_size >= 1, "train.batch_size", "a step needs at least one sequence. Use 1 or more")
    rule(
        c.train.micro_batch_size is None or 1 <= c.train.micro_batch_size <= c.train.batch_size,
        "train.micro_batch_size",
        f"it splits train.batch_size={c.train.batch_size}. Use a value from 1 to that",
    )
    rule(
        (c.train.epochs or 0) >= 1 or (c.train.max_steps or 0) >= 1,
        "train.max_steps",
        "the run has no end. Give train.max_steps or train.epochs, at least 1",
    )
    rule(c.train.log_every >= 1, "train.log_every", "rows are logged every n steps. Use 1 or more")
    rule(c.train.max_nonfinite >= 1, "train.max_nonfinite", "at least one bad step must be seen. Use 1 or more")
    rule(c.train.patience is None or c.train.patience >= 1, "train.patience", "count of evaluations. Use 1 or more")
    for key in ("evaluation.every", "checkpoint.every"):
        every = getattr(getattr(c, key.split(".")[0]), "every")  # noqa: B009
        rule(every is None or every >= 1, key, "an interval is at least one step. Use 1 or more, or null for each epoch")
    rule(c.checkpoint.keep_last >= 1, "checkpoint.keep_last", "the newest checkpoint is always kept. Use 1 or more")
    rule(c.evaluation.batch_size >= 1, "evaluation.batch_size", "a forward needs a row. Use 1 or more")
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


def derived_accumulation(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per rank and optimizer step."""
    per_rank = -(-train.batch_size // world_size)
    return -(-per_rank // min(train.micro_batch_size or per_rank, per_rank))
