"""The configuration tree: one dataclass a group, every key with its meaning, unit and default.

`config/compose.py` turns Hydra overrides into a `Config`; past that edge there is no DictConfig and no `.get`. `config/check.py`
holds the rules that values must keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from hydra.core.config_store import ConfigStore
from tritune.trainer.config.axes import MethodConfig, ObjectiveConfig
from tritune.trainer.config.backends import BackendConfig, FsdpConfig, HsdpConfig, ZeroConfig
from tritune.trainer.config.choices import (
    Activations,
    AdapterMode,
    Attention,
    Dtype,
    Form,
    Implementation,
    Resume,
    Schedule,
    Storage,
)
from tritune.trainer.config.data import AuditConfig, CacheConfig, DataConfig
from tritune.trainer.config.launch import SCHEMAS as LAUNCH_SCHEMAS
from tritune.trainer.config.launch import LaunchConfig
from tritune.trainer.config.registry import AXES, axis_options, built_in, default_option, plugin_options
from tritune.trainer.config.renamed import old_name


@dataclass
class ModelConfig:
    path: str | None = (
        None  # hub id or local folder of a pretrained model; or of an adapter or a run, to go on from or to be read
    )
    adapter: str | None = None  # an adapter to put on `path`, wherever it says that its base is
    adapter_mode: AdapterMode = (
        AdapterMode.keep
    )  # training from an adapter: goes on with it, or merges it and begins a new one
    revision: str | None = None  # branch, tag or commit on the hub
    config: dict[str, Any] = field(default_factory=dict)  # instead of `path`: an architecture with random weights
    tokenizer: str | None = None  # hub id, folder, or "bytes" (built in); default: `path`
    dtype: Dtype = Dtype.float32
    storage: Storage = Storage.plain  # nf4: the linear layers of a frozen base in 4 bits (QLoRA)
    attention: Attention = Attention.sdpa  # PyTorch's fused attention, or the model's own plain code
    chat_template: str | None = None  # a Jinja file, chatml or plain; default: the tokenizer's own, else plain
    pad_token: str | None = None  # default: the tokenizer's own, unless it is a stop token
    add_tokens: list[str] = field(default_factory=list)  # new tokens; embeddings are resized


@dataclass
class OptimConfig:
    name: str = "adamw"  # the optimizer
    lr: float | None = None  # the peak; default: by the method and the model's width (run/rate.py), said at the start
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.01  # not on biases, norms and embeddings
    max_grad_norm: float = 1.0  # gradient clipping
    max_norm: float | None = old_name()  # the old name of optim.max_grad_norm; the next version no longer reads it
    schedule: Schedule = Schedule.cosine  # how the rate goes on after its warm-up
    warmup_ratio: float = 0.03  # share of all steps
    warmup_steps: int | None = None  # instead of the share
    decay_ratio: float = 0.2  # wsd: share of all steps spent going down
    min_lr_ratio: float = 0.0  # the schedule ends at lr x this


@dataclass
class TrainConfig:
    batch_size: int = 32  # sequences (or blocks) per optimizer step over all ranks; it defines the run
    micro_batch_size: int | None = None  # sequences per forward on one rank; only splits the batch
    accumulation: int | None = None  # derived; refused if it disagrees
    epochs: int | None = None  # how often every row comes; this or max_steps is needed
    max_steps: int | None = None  # the earlier of the two ends the run
    max_nonfinite: int = 3  # steps in a row with a NaN or infinite gradient before the run fails
    unpack: bool = False  # compute each row of a pack apart: slower, the same run; for proofs
    log_every: int = 1  # steps between rows of metrics.jsonl and lines of the log
    deterministic: bool = False  # refuse nondeterministic GPU kernels
    activation_checkpointing: Activations = Activations.none  # less memory, more time
    activation_offload: bool = False  # with full: layer inputs wait for backward in host memory
    compile: bool = False  # torch.compile on each decoder layer
    compile_seconds: float = (
        900.0  # seconds that compiling the first batch may take; after that the run ends with a message
    )
    patience: int | None = None  # evaluations without improvement before stopping early
    use_best: bool = False  # test and export the best checkpoint instead of the last


@dataclass
class EvaluationConfig:
    every: int | None = None  # steps; default: once per epoch
    batch_size: int = 64  # rows per forward on one rank
    metric: str = "loss"  # of the validation split; picks the best checkpoint
    base: bool = True  # score the untouched model too, for base against tuned
    splits: list[str] = field(default_factory=lambda: ["validation", "test", "retention"])  # scored before and after
    choices: list[str] = field(
        default_factory=list
    )  # sft: beginnings of an answer of which one is right; gives accuracy
    out: str | None = None  # `tritune evaluate`: JSONL of every row; default: predictions.jsonl in run.dir
    samples: int = 8  # held-out rows on which base and tuned answer freely, for the report
    abstain: float | None = None  # a classifier answers so that this share of its answers on validation is right
    abstain_below: float | None = None  # evaluate, generate: abstain below it; default: the run's own


@dataclass
class CheckpointConfig:
    every: int | None = None  # steps; default: with each evaluation
    keep_last: int = 2  # newest checkpoints that are kept; the best one is kept beside them
    asynchronous: bool = False  # copy the state to host memory, and write it while training goes on
    step: int | None = None  # evaluate, generate, export: of this step; default: the newest, or the best with use_best


@dataclass
class ExportConfig:
    enabled: bool = True  # write the result for other tools when training ends
    form: Form = Form.auto
    dir: str | None = None  # default: <run.dir>/export
    dtype: Dtype | None = None  # default: what the model computes in
    insist: bool = False  # write it although what is read back is not what was trained; the card says by how much
    shard_gb: float = 5.0  # weights are split into files of at most this many gigabytes, with an index


@dataclass
class GenerateConfig:
    file: str | None = None  # prompts, in the formats of data.train: columns messages, prompt or text
    out: str | None = None  # JSONL; default: standard output
    system: str | None = None  # a system turn before each prompt, where there is a chat template
    template: bool = True  # apply the chat template, where there is one
    max_new_tokens: int = 128  # an answer ends there, if it did not before
    num_samples: int = 1  # answers to each prompt
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    top_k: int = 0  # draw among so many likeliest tokens; 0: no limit
    batch_size: int = 16  # prompts answered at a time


@dataclass
class ReportConfig:
    enabled: bool = True  # write report.html when training ends
    question: str | None = None  # what the run is to find out; the report begins with it


@dataclass
class TrackingConfig:
    """Nothing leaves the machine unless one of these is turned on."""

    wandb: bool = False  # through W&B's own client; offline where no key is found
    tensorboard: bool = False  # event files in run.dir; needs `pip install tensorboard`
    project: str = "tritune"  # W&B's project
    entity: str | None = None  # W&B's user or team; default: the key's own
    name: str | None = None  # default: the run directory's name
    group: str | None = None  # W&B's group of runs
    tags: list[str] = field(default_factory=list)  # W&B's tags of the run


@dataclass
class KernelsConfig:
    """Our Triton kernels, or PyTorch: for all of them, and each on its own."""

    name: str = "auto"  # for all: auto is Triton on a GPU, and PyTorch elsewhere
    linear_cross_entropy: Implementation = Implementation.auto  # losses from hidden states and the head
    lora: Implementation = Implementation.auto  # adapted layers
    rms_norm: Implementation = Implementation.auto  # norms, with the residual's addition
    rope: Implementation = Implementation.auto  # rotation of queries and keys
    glu: Implementation = Implementation.auto  # SwiGLU and GeGLU
    self_check: bool = True  # compare each with its reference on this model's shapes before training
    loss_chunk_tokens: int = 4096  # logits are made for this many tokens at a time, never stored whole


@dataclass
class RunConfig:
    dir: str | None = None  # default: runs/<experiment>-<time>
    resume: Resume = Resume.auto


@dataclass
class VerifyConfig:
    """`tritune verify parity | resume`: what is compared with what."""

    steps: int = 20  # of each run of the proof, whatever train.max_steps and train.epochs say
    backends: list[str] = field(
        default_factory=lambda: ["ddp", "fsdp", "fsdp+offload", "hsdp", "zero1", "zero2", "zero3", "zero3+offload"]
    )  # parity: NAME, NAME+offload or NAME@PROCESSES, each beside one process
    parameters_every: int = 1  # parity: steps between comparisons of parameters; each costs a checkpoint
    order: int = (
        0  # of a step's micro-batches and of the norm's terms; not 0: a random one, which changes rounding alone
    )
    orders: int = 10  # parity in bfloat16: random orders of the reference's micro-batches, whose spread is the measure
    kill_at: int | None = None  # resume: step after which every rank is killed; default: half of verify.steps
    to_backend: str | None = None  # resume: the backend that goes on; default: the same
    to_procs: int | None = None  # resume: on so many processes; default: as many


@dataclass
class Config:
    seed: int = 0  # of everything that is drawn: weights, order, dropout
    plugins: list[str] = field(default_factory=list)  # Python files of your own objectives and methods
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    method: MethodConfig = field(default_factory=partial(default_option, "method"))
    objective: ObjectiveConfig = field(default_factory=partial(default_option, "objective"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


# Keys that decide what the loss curve is. A run resumed with another value of one of them would be another run.
IDENTITY = (
    "seed",
    "model",
    "data",
    "method",
    "objective",
    "optim",
    "train.batch_size",
    "train.epochs",
    "train.max_steps",
    "evaluation.metric",
)

_SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"hub": ModelConfig},
    "optim": {"adamw": OptimConfig},
    "backend": {
        "auto": BackendConfig,
        "fsdp": FsdpConfig,
        "hsdp": HsdpConfig,
        "zero1": ZeroConfig,
        "zero2": ZeroConfig,
        "zero3": ZeroConfig,
    },
    "kernels": {"auto": KernelsConfig},
    "launch": LAUNCH_SCHEMAS,
}
GROUPS = ("model", "method", "objective", "optim", "backend", "kernels", "launch", "experiment")

# What `<group>.name` may be. It follows from the option chosen; a YAML that sets it by hand is refused unless it fits.
_NAMES: dict[str, tuple[str, ...]] = {
    "backend": ("auto", "single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"),
    "kernels": ("auto", "triton", "reference"),
    "optim": ("adamw",),
}
SPLITS = ("train", "validation", "test", "retention")


def schemas() -> dict[str, dict[str, type]]:
    """Group -> the dataclass of each of its options."""
    return _SCHEMAS | {axis: axis_options(axis) for axis in AXES}


def names() -> dict[str, tuple[str, ...]]:
    """Group -> what `<group>.name` may be, where the group has names."""
    return _NAMES | {axis: tuple(axis_options(axis)) for axis in AXES}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore, under `<group>/schema_<name>`, and users' own options under their names."""
    _register_ours()
    for axis in AXES:
        for name, schema in plugin_options(axis).items():
            ConfigStore.instance().store(group=axis, name=name, node=schema)


@cache
def _register_ours() -> None:
    """Once in a process, since it takes 0.1 s."""
    store = ConfigStore.instance()
    # With the bases of the axes: OmegaConf merges an option into its base, and not into another option.
    store.store(name="schema", node=Config(method=MethodConfig(), objective=ObjectiveConfig()))
    for group, options in _SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=group, name=f"schema_{name}", node=schema)
    for axis in AXES:
        for name, schema in built_in(axis).items():
            store.store(group=axis, name=f"schema_{name}", node=schema)
