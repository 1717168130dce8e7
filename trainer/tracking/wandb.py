"""Weights & Biases, through its own client, told to send the figures and the config and nothing else."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tritune.trainer.config import TrackingConfig
from tritune.trainer.errors import reason
from tritune.trainer.redact import redact
from tritune.trainer.run.directory import replace_file
from tritune.trainer.run.files import read_json

if TYPE_CHECKING:
    from tritune.trainer.tracking import Say

STEP = "step"  # our own axis: W&B's refuses rows whose step it has passed, as those repeated after a crash
INIT_SECONDS = 30.0
FINISH_SECONDS = 120.0
FLUSH_SECONDS = 1.0
FILE = "tracking.json"


class WandbSink:
    """A run of the client. Every method may raise; `Guarded` keeps that from the training."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({STEP: step, **figures})

    def summary(self, figures: dict[str, float]) -> None:
        self._run.summary.update(figures)

    def close(self, exit_code: int) -> None:
        """Upload what is left, for at most two minutes.

        Raises:
            TimeoutError: it was not all sent; the files hold it.
        """
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            _end_service()


def open_wandb(config: TrackingConfig, directory: Path, resolved: dict, say: Say) -> WandbSink | None:
    """Begin the run of this directory, or go on with it; None where WANDB_MODE is disabled.

    Online where a key is found (WANDB_API_KEY, ~/.netrc, the client's settings), else offline, which is said; offline, too,
    where the server cannot be reached.

    Raises:
        Exception: whatever the client raises, where not even an offline run could be made.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the client would report its errors and counters home
    import wandb

    wandb.setup(settings=wandb.Settings(show_info=False))  # warnings and errors of the client stay visible
    mode = wandb.setup().settings.mode
    if mode == "disabled":
        say("tracking  W&B is turned off by WANDB_MODE=disabled")
        return None
    if mode in ("offline", "dryrun"):
        why = f"WANDB_MODE={mode}" if os.environ.get("WANDB_MODE") else "the client is set to offline"
        return _offline(config, directory, resolved, say, why)
    try:
        # Not `wandb.init` alone: without a key it would ask for one in a terminal, and training would wait.
        if not wandb.login(prompt=False, verify=False):
            why = "no key is found: set WANDB_API_KEY or run `wandb login`"
            return _offline(config, directory, resolved, say, why)
        run = _begin(config, directory, resolved, "online")
    except Exception as error:  # noqa: BLE001  a server out of reach is announced, and the figures kept
        _end_service()
        return _offline(config, directory, resolved, say, reason(error))
    say(redact(f"tracking  W&B {run.url}"))
    return WandbSink(run)


def _end_service() -> None:
    """End the client's own process now: a rank among several leaves without `atexit`, where the client would do it.

    Raises:
        RuntimeError: it ended badly. The client would end our process with its status.
    """
    import wandb

    try:
        wandb.teardown()
    except SystemExit as status:
        raise RuntimeError(f"its service ended with status {status.code}") from None


def _offline(config: TrackingConfig, directory: Path, resolved: dict, say: Say, why: str) -> WandbSink:
    sink = WandbSink(_begin(config, directory, resolved, "offline"))
    # Of a resumed run there are several folders, which `wandb sync` joins into one run by their id.
    say(redact(f"tracking  W&B offline ({why}); to send it: wandb sync {directory / 'wandb'}/offline-run-*"))
    return sink


def _begin(config: TrackingConfig, directory: Path, resolved: dict, mode: Literal["online", "offline"]) -> Any:
    import wandb

    run = wandb.init(
        mode=mode,
        dir=str(directory),
        id=_run_id(directory),
        resume="allow",
        project=config.project,
        entity=config.entity,
        name=config.name or directory.resolve().name,
        group=config.group,
        tags=config.tags or None,
        config=resolved,
        save_code=False,
        reinit="create_new",  # never another run of this process, nor `wandb.run` for others to write into
        settings=_settings(),
    )
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    return run


def _settings() -> Any:
    """What the client may collect and how long it may take."""
    import wandb

    return wandb.Settings(
        host="",  # else the machine's name goes into the run's record
        console="off",  # else stdout and stderr are uploaded
        disable_git=True,  # else the remote, the commit and a diff
        disable_code=True,
        disable_job_creation=True,
        label_disable=True,  # else the main module's docstring is searched for labels
        x_disable_meta=True,  # else the command line, the user, the paths and the hardware
        x_disable_machine_info=True,
        x_disable_stats=True,  # else the whole machine's load, every 15 seconds, and a query to the cloud's metadata server
        x_save_requirements=False,  # else every installed package
        sagemaker_disable=True,  # it would replace the run's id
        silent=True,  # the summary that the client prints at the end; warnings come by another way
        # The client's process drops what it has not written when ours is killed: the last 15 seconds, by default.
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def _run_id(directory: Path) -> str:
    """The run's id at W&B, made once for a directory, so that a resumed run goes on under it."""
    path = directory / FILE
    content = read_json(path, dict, "Move it away: the run goes on as another one at W&B") or {}
    if "wandb_id" not in content:
        content["wandb_id"] = uuid.uuid4().hex[:12]
        replace_file(path, json.dumps(content) + "\n")
    return content["wandb_id"]
