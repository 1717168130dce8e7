"""Preempt one job again and again on the virtual Slurm; its curve must be that of a run that never was, to the bit.

python tests/launch/many_preemptions.py 20
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import harness  # noqa: E402
from test_slurm import attempt, running, said, submit  # noqa: E402
from test_supervise import attempts, curve, plant, wait_for  # noqa: E402

STEPS = 200
PACE = """
    import os, time
    from tritune.trainer.run.stop import Stop
    pause = 0.4 if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < COUNT else 0.0
    agreed = Stop.agreed
    Stop.agreed = lambda self, *rest: (time.sleep(pause), agreed(self, *rest))[1]
"""


def main(count: int) -> None:
    root = Path(tempfile.mkdtemp(prefix="preempted"))
    harness.write_prompts(root / "rows.jsonl", 30, seed=4)
    settings = ["model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", "data.max_length=96",
                f"data.train={root / 'rows.jsonl'}", "train.batch_size=8", "backend.device=cpu", "checkpoint.every=1000",
                "evaluation.base=false", "evaluation.samples=0", "export.enabled=false", "report.enabled=false",
                f"train.max_steps={STEPS}"]  # fmt: skip
    harness.run([*settings, f"run.dir={root / 'unbroken'}"], root / "logs", world_size=2)
    plant(root, PACE.replace("COUNT", str(count)).replace("\n    ", "\n        "))
    run, began = root / "run", time.monotonic()
    with running("cgroup") as found:
        job = submit(found, [*settings, "launch.num_procs=1", f"run.dir={run}"], PYTHONPATH=str(root))
        for number in range(count):
            wait_for(attempt(found, job, number, run, 2), 300)
            found.call(
                "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true"
            )
            print(
                f"{number + 1}: after step {harness.rows(run)[-1]['step']}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
        ended = found.wait_for_end(job)
    stopped = re.findall(r"after step (\d+), saved", said(run))
    resumed = re.findall(r"resume    from step-\d+, step (\d+)", said(run))
    print(f"{ended['JobState']} after {ended['Restarts']} requeues; {len(attempts(run))} attempts")
    print(f"stopped after {', '.join(stopped)}; went on from {', '.join(resumed)}")
    same = curve(run) == curve(root / "unbroken")
    print(f"{STEPS} steps, {'bit for bit those' if same else 'NOT THOSE'} of an unbroken run")
    sys.exit(0 if same and stopped == resumed and ended["JobState"] == "COMPLETED" else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
