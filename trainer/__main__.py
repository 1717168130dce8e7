"""`torchrun -m tritune.trainer [--config-dir DIR] [key=value ...]`: one rank of a run. Nothing stands between it and the loop."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tritune.trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_STOPPED,
    INPUT_ERRORS,
    CheckpointError,
    DamagedRows,
    ExportError,
    LostConnectionError,
    NonFiniteError,
    PeerError,
    StopRequested,
    of_surroundings,
)
from tritune.trainer.parallel.peers import Peers, open_peers
from tritune.trainer.parallel.threads import wait_asleep
from tritune.trainer.run.interrupted import to_the_end
from tritune.trainer.run.last_word import last_word, status_of, tell_without
from tritune.trainer.run.pulse import begin, end_with_parent, launch_time, note_error
from tritune.trainer.shown import shown

CLOSING = "closing"  # the phase after the end is written down
LOSS_SECONDS = 0.5  # word of a rank's death may come a moment after the error that a collective makes of it

if TYPE_CHECKING:
    from tritune.trainer.config import Config
    from tritune.trainer.config.schema import TrainConfig
    from tritune.trainer.run.directory import RunDir
    from tritune.trainer.run.guard import Limit


def main(argv: list[str] | None = None) -> int:
    """Train as the overrides say and return the exit status: 0 done, 2 wrong input, 75 stopped on request, 1 else."""
    argv = list(sys.argv[1:] if argv is None else argv)
    leader = int(os.environ.get("RANK", "0")) == 0
    wait_asleep()
    begin("config")
    given = list(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    peers = Peers()
    try:
        peers = open_peers(os.environ, _end_without)
        from tritune.trainer.config.compose import load_config, split_argv

        config_dir, argv = split_argv(argv)
        # Several look for the files together, in build: one may be missing on one machine alone.
        config = (load_config if processes > 1 else checked_config)(argv, config_dir, processes)
    except INPUT_ERRORS as error:
        if leader:
            print(f"tritune: {shown(str(error))}", file=sys.stderr)
        peers.close(last_word(EXIT_INPUT, str(error)))
        return EXIT_INPUT
    from tritune.trainer.run.directory import run_path

    return run(config, run_path(config.run.dir, argv), leader, given, peers)


def checked_config(overrides: list[str], config_dir: str | None, processes: int | None) -> Config:
    """The configuration, once its files are known to be there: all that can be refused within a second.

    Raises:
        InputError, ConfigFaults: what is wrong.
    """
    from tritune.trainer.config.compose import load_config
    from tritune.trainer.data.records import require_sources
    from tritune.trainer.tracking import require_trackers

    config = load_config(overrides, config_dir, processes)
    require_sources(config.data)
    require_trackers(config.tracking)
    return config


def run(config: Config, path: Path, leader: bool, overrides: list[str], peers: Peers) -> int:
    """Build, train, finish; write down in `status.json` how it ended.

    Args:
        overrides: what the user gave, for the record of how to run it again.
        peers: the other ranks.
    """
    begin("imports")
    peers.expect(config.backend.join_seconds if "TORCHELASTIC_RUN_ID" in os.environ else None)
    from tritune.trainer.build import build
    from tritune.trainer.checkpoint.names import newest_step
    from tritune.trainer.finish import finish, score_base
    from tritune.trainer.loop import fit, warn_of_slow_save
    from tritune.trainer.metrics.progress import Progress
    from tritune.trainer.parallel import distributed
    from tritune.trainer.run.directory import RunDir
    from tritune.trainer.run.guard import Guard
    from tritune.trainer.run.pulse import Pulse
    from tritune.trainer.run.stop import Stop

    stop, progress = Stop().install(), Progress(leader)
    rank, limits = int(os.environ.get("RANK", "0")), config.launch
    pulse = Pulse(rank, limits.quiet_seconds, limits.hang_factor, limits.hang_seconds)
    directory, world, owned, built = RunDir(path, overrides), None, False, None
    state, code, culprit, refused = "failed", EXIT_FAILED, None, False

    def abandon(why: str, asked: bool) -> None:
        """On the guard's thread, while the main one is out of reach; the newest checkpoint is what the next start has."""
        if pulse.where() == CLOSING:  # how it ended is written down; only a tracker is still waited for
            _end_process(code)
        lost = peers.lost(0.0)
        if asked and lost is not None:  # by torchrun, which ends all when one has died
            end_without(lost)
        saved = newest_step(directory.path / "checkpoints") if owned else 0
        after = f"; the same command goes on from {f'step {saved}' if saved else 'the start'}"
        doing = pulse.where()
        with suppress(OSError):
            if owned and asked:
                directory.write_status("stopped", saved, EXIT_STOPPED, why)
            elif owned:
                directory.write_refusal(why, EXIT_INPUT)
            progress.say(f"stopped   by {why} while in {doing!r}{after}" if asked else f"tritune: {why}")
        peers.close(last_word(EXIT_STOPPED if asked else EXIT_INPUT, why))
        _end_process(EXIT_STOPPED if asked else EXIT_INPUT)

    def lose(lost: str) -> int:
        """Say who was lost; return the status to end with."""
        status = status_of(lost)
        if status == EXIT_FAILED:
            note_error(rank, PeerError(lost))
        progress.say(f"tritune: {lost}; the same command goes on from the newest checkpoint")
        tell_without(lost, None if owned else directory.path)
        return status

    def lost_or_failed(error: Exception) -> tuple[int, str]:
        """Status and culprit: another rank where its death made this error, a broken save, say; else the error."""
        lost = peers.lost(LOSS_SECONDS)
        if lost is not None:
            return lose(lost), lost
        note_error(rank, error)
        said = of_surroundings(error) or f"{type(error).__name__}: {error}"
        progress.say(f"tritune: {said}")
        return EXIT_FAILED, said

    def end_without(lost: str) -> None:
        """On the thread of the peers, while the main one waits for a rank that is no more."""
        if pulse.where() == CLOSING:
            _end_process(code)
        status = status_of(lost)
        with suppress(OSError):
            lose(lost)
            if owned:
                step = built.state.step if built else newest_step(directory.path / "checkpoints")
                _write_end(directory, "failed", step, status, lost, refused=status == EXIT_INPUT and built is None)
        _end_process(status)

    guard = Guard(stop, pulse.where, abandon, _limits(config.train))
    peers.watch(lambda: pulse.where() == CLOSING, end_without)
    try:
        world = distributed.start(config.backend, config.train.deterministic)
        unseen = peers.joined()
        directory = RunDir(
            Path(world.gather(str(path))[0]), overrides
        )  # clocks differ, and a name may be made from the time
        with world.raise_on_all("taking the run directory"):
            if leader:
                directory.acquire()
                owned = True
                progress.open_log(directory.path / "train.log")
                stop.watch(directory.path, launch_time())
                pulse.startup_file = directory.path / "startup.json"
        if not leader:  # after the leader removed a file from before
            stop.watch(directory.path, launch_time(), leads=False)
        progress.say(f"run       {directory.path}")
        if unseen:
            progress.say(f"peers     {unseen[:8]} did not reach rank 0: only collectives see these ranks die")
        built = build(config, world, directory, progress, stop, pulse)
        warn_of_slow_save(built)
        if leader:
            directory.write_status("training", built.state.step)
        pulse.phase("base")
        base = score_base(built)
        pulse.phase("train")
        stopped_by = fit(built)
        pulse.phase("finish")
        stop.forget()
        if stopped_by:
            progress.say(
                f"stopped   by {stopped_by} after step {built.state.step}, saved; the same command goes on from there"
            )
            state, code, culprit = "stopped", EXIT_STOPPED, stopped_by
        else:
            finish(built, base)
            state, code = "done", EXIT_DONE
    except INPUT_ERRORS as error:
        progress.say(f"tritune: {error}")
        damaged = isinstance(error, DamagedRows)  # nobody's input: a launcher starts again, and then they are read anew
        code, culprit = EXIT_FAILED if damaged else EXIT_INPUT, str(error)
        if damaged:
            note_error(rank, error)
        if world is None and not leader and int(os.environ.get("GROUP_RANK", "0")) > 0:
            note_error(rank, error)  # of another machine: the first knows nothing of it
        if not leader and (world is not None or os.environ.get("LOCAL_RANK") == "0"):
            print(f"tritune: rank {os.environ['RANK']}: {shown(str(error))}", file=sys.stderr)
    except StopRequested as error:
        stop.forget()
        saved, lost = newest_step(directory.path / "checkpoints"), peers.lost(0.0)
        if lost is not None:  # then torchrun asked, which ends all when one has died
            code, culprit = lose(lost), lost
        else:
            after = f"step {saved}" if saved else "the start"
            progress.say(f"stopped   by {error}; the same command goes on from {after}")
            state, code, culprit = "stopped", EXIT_STOPPED, str(error)
    except PeerError as error:
        code, culprit = (EXIT_INPUT if "InputError" in str(error) else EXIT_FAILED), str(error)
        if code == EXIT_FAILED:
            note_error(rank, error)
    except ExportError as error:  # said already; everything but the export is done
        code, culprit = (EXIT_INPUT if error.asked_wrongly else EXIT_FAILED), str(error)
        if code == EXIT_FAILED:
            note_error(rank, error)
    except (CheckpointError, NonFiniteError, LostConnectionError) as error:  # its message says all of it
        code, culprit = lost_or_failed(error)
    except KeyboardInterrupt:
        culprit = "interrupted twice"
    except Exception as error:  # noqa: BLE001  every end is written down; the traceback is shown
        if of_surroundings(error) is None:
            print(shown(traceback.format_exc()), end="", file=sys.stderr)
        code, culprit = lost_or_failed(error)
    finally:
        if owned:
            step = built.state.step if built else newest_step(directory.path / "checkpoints")
            refused = code == EXIT_INPUT and built is None
            _write_end(directory, state, step, code, culprit, refused)
            pulse.phase(CLOSING)
            for sink in built.sinks if built else []:
                sink.close(code)
        if built is not None:
            built.loader.close()
        progress.close()
        if refused:
            directory.discard()
        directory.close()
        distributed.end()
        peers.close(last_word(code, culprit))
        pulse.phase("ended")
        guard.close()
    return code


def _end_without(lost: str) -> None:
    """On the thread of the peers, before there is a run to write down anything of."""
    if status_of(lost) == EXIT_FAILED:
        note_error(int(os.environ.get("RANK", "0")), PeerError(lost))
    print(f"tritune: {shown(lost)}; the same command starts again", file=sys.stderr)
    _end_process(status_of(lost))


def _limits(train: TrainConfig) -> dict[str, Limit]:
    """Of the phases of a run. Compilation is the one that is known to go on without an end."""
    from tritune.trainer.run.guard import Limit

    if not train.compile:
        return {}
    seconds = train.compile_seconds
    why = f"train.compile=true: torch.compile was not done with the first batch after {seconds:g} s"
    remedy = "Leave it out: without it our kernels compute. Or raise train.compile_seconds"
    return {"dry run": Limit(seconds, f"{why}. {remedy}")}


def _write_end(directory: RunDir, state: str, step: int, code: int, culprit: str | None, refused: bool) -> None:
    """The last status. A start that was refused leaves what the directory says of an earlier run."""
    try:
        if refused:
            directory.write_refusal(culprit or "", code)
        else:
            directory.write_status(state, step, code, culprit)
    except OSError as error:
        print(f"tritune: status.json could not be written: {error.strerror}", file=sys.stderr)


def worker() -> int:
    """`main` for a process that a launcher started.

    Our own launcher learns the exit status from a file, and torchrun none: it would report every status but 0 as a crash,
    with a traceback of its own behind our one message.
    """
    end_with_parent()
    _log_apart()
    return _status_for_launcher(to_the_end(main))


def _status_for_launcher(code: int) -> int:
    note = os.environ.get("TRITUNE_EXIT_FILE")
    if note is None:
        return code
    if os.environ.get("RANK", "0") == "0":
        Path(note).write_text(str(code))
    return 0 if code in (EXIT_INPUT, EXIT_STOPPED) else code


def _end_process(code: int) -> NoReturn:
    """From any thread, whatever the others do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status_for_launcher(code))


def _log_apart() -> None:
    """Every rank but the first writes to a file of its own, where a launcher asks for it: the terminal shows one voice."""
    folder, rank = os.environ.get("TRITUNE_LOG_DIR"), os.environ.get("RANK", "0")
    if folder is not None and rank != "0":
        log = os.open(Path(folder) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(
            f"--- rank {rank} on {socket.gethostname()}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}",
            flush=True,
        )


def leave(code: int) -> NoReturn:
    """End the process; a rank among several skips the interpreter's own teardown.

    Everything is written and closed by now. Gloo's threads may still hold a last tensor, and one that asks for the
    interpreter's lock while it shuts down is ended by force, which aborts the process (2 of 36 runs on a busy machine).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(worker())
