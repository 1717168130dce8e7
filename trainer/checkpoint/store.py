"""The checkpoints of a run: commit, find the newest whole one, keep the last few and the best."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tritune.trainer.checkpoint.background import Background
from tritune.trainer.checkpoint.coverage import strict_json
from tritune.trainer.checkpoint.manifest import describe, is_flat, sync_directory, verify, write_json, write_manifest
from tritune.trainer.checkpoint.names import saved_steps, step_name
from tritune.trainer.checkpoint.tensors import describe_tensors, load_tensors, save_tensors
from tritune.trainer.errors import CheckpointError, reason
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import Shard

STATE = "state.json"
PARTIAL = ".partial-"  # being written, or being deleted; swept at the next start


class CheckpointStore:
    """Checkpoints under `root`, one directory a step: `step-00000100/`.

    A save writes a new directory under another name, fsyncs every file, writes the manifest, renames and fsyncs the
    parent. So at any moment each `step-*` is whole, and nothing older goes before a newer one is there.

    Args:
        say: prints a line where the user looks; called on rank 0.
        asynchronous: copy the state to host memory and write it in a thread of its own, over a process group of its own.
    """

    def __init__(
        self, root: Path, keep_last: int, world: World, say: Callable[[str], None], asynchronous: bool = False
    ) -> None:
        self.root, self.keep_last, self.world, self.say = root, keep_last, world, say
        self.seconds: float | None = None  # the last save that was finished took, from its first byte to its commit
        self._background = Background(world) if asynchronous else None

    def save(self, step: int, tensors: dict[str, Shard], state: dict[str, Any], best_step: int | None) -> None:
        """Write and commit a checkpoint, then prune; where asynchronous, begin to.

        Raises:
            CheckpointError: it, or the one begun before it, could not be written (a full disk, say). The partial one is
                removed, older ones stay.
        """
        if self._background is None:
            self._save(self.world, tensors, step, state, best_step)
        else:
            self._background.start(partial(self._save, step=step, state=state, best_step=best_step), tensors)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: what was begun could not be written.
        """
        if self._background is not None:
            self._background.wait()

    def _save(
        self, world: World, tensors: dict[str, Shard], step: int, state: dict[str, Any], best_step: int | None
    ) -> None:
        final = self.root / step_name(step)
        began = time.perf_counter()
        if final.exists():  # this very step is saved already: the state at a step is one and the same
            return
        unfinished = self.root / (PARTIAL + final.name)
        try:
            with world.raise_on_all("preparing a checkpoint"):
                if world.rank == 0:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
            with world.raise_on_all("writing a checkpoint"):
                described = {n: describe(unfinished / n) for n in save_tensors(unfinished, tensors, world)}
            files = {name: entry for part in world.gather(described) for name, entry in part.items()}
            with world.raise_on_all("committing a checkpoint"):
                if world.rank == 0:
                    for name, entry in files.items():
                        if not (unfinished / name).is_file() or (unfinished / name).stat().st_size != entry["size"]:
                            raise CheckpointError(
                                f"{name} was written by its rank and is not here: run.dir must be on a file system "
                                "that all ranks share"
                            )
                    write_json(unfinished / STATE, state)
                    files[STATE] = describe(unfinished / STATE)
                    write_manifest(unfinished, step, files, describe_tensors(tensors))
                    sync_directory(unfinished)
                    unfinished.rename(final)
                    sync_directory(self.root)
        except Exception as error:
            if world.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            said = f"step {step} could not be saved to {self.root}: {reason(error)}"
            remedy = "What was saved before is whole: make room, or mend it, and the same command goes on from there"
            raise CheckpointError(f"{said}. {remedy}") from error
        with world.raise_on_all("pruning checkpoints"):
            if world.rank == 0:
                self._prune(best_step)
        self.seconds = time.perf_counter() - began

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint with its manifest, None where there is none at all.

        Broken ones are said aloud and moved aside as `step-*.broken`. Verified on rank 0; all ranks get its answer.

        Raises:
            CheckpointError: there are checkpoints, and not one is whole.
        """
        answer: tuple[Path, dict[str, Any]] | None = None
        with self.world.raise_on_all("verifying checkpoints"):
            if self.world.rank == 0:
                answer = self._newest()
        return self.world.gather(answer)[0]

    def load(self, found: tuple[Path, dict[str, Any]], tensors: dict[str, Shard]) -> dict[str, Any]:
        """Read tensors in place and return the JSON state.

        Raises:
            CheckpointError: they are not the run's, or the state does not read.
        """
        self.wait()
        path, manifest = found
        with self.world.raise_on_all(f"reading {path.name}"):
            load_tensors(path, tensors, manifest["tensors"], self.world, is_flat(manifest))
            return read_state(path)

    def at(self, step: int) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of a step, verified; None if there is none."""
        self.wait()
        path = self.root / step_name(step)
        answer: tuple[Path, dict[str, Any]] | None = None
        with self.world.raise_on_all(f"verifying {path.name}"):
            if self.world.rank == 0 and path.is_dir():
                answer = path, _verified(path)
        return self.world.gather(answer)[0]

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        for leftover in self.root.glob(PARTIAL + "*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        steps = saved_steps(self.root)
        for path in reversed(steps):
            try:
                return path, _verified(path)
            except CheckpointError as error:
                aside = next(
                    p for i in range(1000) if not os.path.lexists(p := path.with_name(f"{path.name}.broken{i or ''}"))
                )
                path.rename(aside)
                self.say(f"checkpoint {path.name} is broken and not used: {error}. Moved to {aside.name}")
        if steps:
            raise CheckpointError(
                f"{self.root}: none of {len(steps)} checkpoint(s) is whole. They were kept as *.broken; "
                "start again with another run.dir, or in this one now that they are aside"
            )
        return None

    def _prune(self, best_step: int | None) -> None:
        keep = {step_name(best_step)} if best_step is not None else set()
        for path in saved_steps(self.root)[: -self.keep_last]:
            if path.name not in keep:
                doomed = path.with_name(PARTIAL + path.name + "-old")
                path.rename(doomed)  # a kill half way through must not leave half a checkpoint under its name
                shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint that was verified.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        state = strict_json((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE}: it does not read ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: it is no JSON object")
    return state


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint, which is of the step that its directory is named after."""
    manifest = verify(path, [STATE])
    if step_name(manifest["step"]) != path.name:
        raise CheckpointError(f"{path}: it is named so, and holds step {manifest['step']:,}")
    read_state(path)
    return manifest
