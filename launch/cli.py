"""`tritune VERB [overrides]`: the command line."""

from __future__ import annotations

import sys
from functools import partial

from tritune.trainer import __version__
from tritune.trainer.parallel.threads import wait_asleep
from tritune.trainer.run.interrupted import to_the_end

USAGE = """\
usage: tritune VERB [--config-dir DIR] [key=value ...]

Distributed fine-tuning of language models.

verbs:
  train     train as the configuration says, from raw rows to a scored and exported model with its report
  submit    the same as a Slurm job: launch=slurm launch.nodes=N; launch.dry_run=true prints its script
  doctor    software, GPUs, kernels, disk, clocks and network, here or on a job's machines: pass, warn or fail
  audit     read all data as train would, before a GPU is held: bad rows, leaks, cuts, duplicates, personal data
  evaluate  score a run (run.dir=DIR), an export, an adapter or a hub model (model.path=PATH) on the splits given
  generate  answer prompts (--prompt "..." as often as you like, or generate.file=FILE); JSONL on standard output
  export    write what a run trained (run.dir=DIR export.form=adapter|merged|full), read it back, compare
  report    write report.html of a run (run.dir=DIR) anew
  verify    parity: your configuration on each backend against one process; resume: a run that was killed against one that was not
  config    print the resolved configuration and its faults; nothing is loaded

Every verb takes the same Hydra overrides:
  experiment=NAME        a whole named run: {experiments}
  run.dir=DIR            where it goes; the same command goes on with a run that was stopped
  model.path=PATH        hub id or folder          data.train=FILE    .jsonl .csv .parquet .txt or hf://name:split
  objective=NAME         what is learnt: {objective}
  method=NAME            what trains: {method}
  backend=NAME           where the state lives: auto, single, ddp, fsdp, hsdp, zero1, zero2, zero3
  launch.num_procs=N     processes on a machine; launch.max_restarts=N restarts after a crash
  train.batch_size=N     sequences per step over all ranks; train.micro_batch_size=N only splits it
  tracking.wandb=true    W&B, offline without a key; tracking.tensorboard=true; both are off unless asked
  --config-dir DIR       a folder of your own groups, e.g. DIR/experiment/mine.yaml

`tritune config` shows every key with its value; conf/README.md says what each means.
Under torchrun: torchrun --nproc-per-node 8 -m tritune.trainer [overrides]

exit status: 0 done, 1 failed, 2 wrong input, 75 stopped on request (the same command goes on)
"""


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit status.

    Args:
        argv: None for those of this process, which the verb is then the whole purpose of.
    """
    if argv is None:
        return to_the_end(partial(main, sys.argv[1:]))
    wait_asleep()
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help", "help") or argv[1:2] in (["-h"], ["--help"]):
        print(_usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"tritune {__version__}")
        return 0
    verbs = {
        "train": _train,
        "submit": _submit,
        "doctor": _doctor,
        "audit": _audit,
        "verify": _verify,
        "config": _config,
        "generate": _generate,
    }
    verbs |= {name: partial(_read, name) for name in ("evaluate", "export", "report")}
    if argv[0] not in verbs:
        import difflib

        near = difflib.get_close_matches(argv[0], verbs, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(verbs)}"
        from tritune.trainer.shown import bounded, shown

        print(shown(f"tritune: {bounded(argv[0])}: there is no such verb. {hint} (tritune --help)"), file=sys.stderr)
        return 2
    try:
        return verbs[argv[0]](argv[1:])
    except OSError as error:
        from tritune.trainer.errors import EXIT_FAILED, of_surroundings
        from tritune.trainer.shown import shown

        said = of_surroundings(error)
        if said is None:
            raise
        print(f"tritune: {shown(said)}", file=sys.stderr)
        return EXIT_FAILED


def _usage() -> str:
    from tritune.trainer.config.registry import AXES, axis_options

    return USAGE.format(experiments=", ".join(_experiments()), **{axis: ", ".join(axis_options(axis)) for axis in AXES})


def _train(argv: list[str]) -> int:
    from tritune.launch.torchrun import train

    return train(argv)


def _submit(argv: list[str]) -> int:
    from tritune.launch.slurm import submit

    return submit(argv)


def _doctor(argv: list[str]) -> int:
    from tritune.launch.doctor import doctor

    return doctor(argv)


def _audit(argv: list[str]) -> int:
    from tritune.trainer.audit.verb import main as audit

    return audit(argv)


def _verify(argv: list[str]) -> int:
    from tritune.launch.verify import verify

    return verify(argv)


def _read(name: str, argv: list[str]) -> int:
    from tritune.launch.reading import processes_of, read_together

    if (processes := processes_of(argv)) > 1:
        return read_together(name, argv, processes)
    from tritune.trainer import verbs

    return verbs.run_verb(getattr(verbs, name), argv)


def _generate(argv: list[str]) -> int:
    """Prompts are taken out before Hydra reads the rest: its grammar gives commas and quotes a meaning."""
    from tritune.launch.reading import processes_of, read_together
    from tritune.trainer import verbs

    prompts, rest = [], []
    words = iter(argv)
    for word in words:
        if word in ("--prompt", "-p"):
            prompt = next(words, None)
            if prompt is None:
                print('tritune: --prompt: it stands without a text. Write --prompt "..."', file=sys.stderr)
                return 2
            prompts.append(prompt)
        elif word.startswith("--prompt="):
            prompts.append(word.partition("=")[2])
        else:
            rest.append(word)
    if (processes := processes_of(rest)) > 1:
        return read_together("generate", argv, processes)
    return verbs.run_verb(verbs.generate, rest, prompts=prompts)


def _config(argv: list[str]) -> int:
    import yaml
    from tritune.trainer.config.compose import compose_partly, split_argv, to_dict, unheld_rules
    from tritune.trainer.redact import redact
    from tritune.trainer.shown import TAIL, bounded, shown

    config_dir, overrides = split_argv(argv)
    config, faults = compose_partly(overrides, config_dir)
    if config is not None:
        print(redact(yaml.safe_dump(to_dict(config), sort_keys=False)), end="")
        faults = faults + unheld_rules(config, faults)
    for fault in faults:
        print(f"tritune: {shown(bounded(fault, tail=TAIL))}", file=sys.stderr)
    return 2 if faults else 0


def _experiments() -> list[str]:
    from pathlib import Path

    import tritune.conf

    return sorted(p.stem for p in (Path(tritune.conf.__file__).parent / "experiment").glob("*.yaml"))


if __name__ == "__main__":
    sys.exit(main())
