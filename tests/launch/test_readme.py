"""Every command of the front page and of the folders' manuals, run as printed on small files of the names that it has.

What is added to a command, or why it is not run here, stands in one of two tables; a line of theirs without its command fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import harness
import pytest

ROOT = Path(__file__).resolve().parents[2]
MANUALS = ["README.md", *(f"{folder}/README.md" for folder in ("trainer", "launch", "kernels", "benchmarks", "conf"))]
BLOCK_LINE = re.compile(r"^(?:    )?((?:tritune|make|pip|python|torchrun|apt-get|\.) .*?)(?:\s+#.*)?$", re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of a manual: lines of indented and of fenced blocks."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    return BLOCK_LINE.findall(f"{indented}\n{fenced}")


COMMANDS = list(dict.fromkeys(c for manual in MANUALS for c in commands((ROOT / manual).read_text())))
HUB = ["model.path=MODEL"]  # in place of the hub's model
HUB_LLAMA = [*HUB, "model.pad_token=null"]  # it has no reserved tokens
# What is added, and why. Every other command runs as printed.
ADDED = {
    "tritune train experiment=qwen3_0_6b_sft": HUB,
    "tritune submit experiment=llama3_8b_lora": HUB_LLAMA,
}
# What runs in another test, or not at all, and why.
ELSEWHERE = {
    "tritune verify": "test_the_proofs_run, which is slow",
    "tritune doctor launch=slurm": "tests/launch/test_doctor.py, on a virtual cluster",
    "tritune train method=lora model.path=MODEL data.train=rows.jsonl train.epochs=2 launch.num_procs=2":
        "test_the_watched_command_runs, which is slow",
    "torchrun --nnodes=2": "test_two_machines_without_a_scheduler_train_what_one_does, on CPU, one process a machine",
    "torchrun --nproc-per-node 8": "test_the_torchrun_command_runs, on CPU, with two processes in place of eight",
    "make demo": "tests/launch/test_quickstart.py, and by hand in a fresh clone",
    "make test": "this very run",
    "pip install .": "tests/launch/test_packaging.py builds the wheel and installs it",
    ". .venv/bin/activate": "by hand in a fresh clone",
    "tritune generate run.dir=runs/quickstart/tuned": "tests/launch/test_quickstart.py",
    "python benchmarks/kernels.py": "it needs a GPU; tests/kernels/test_benchmarks.py reads its parts",
    "apt-get install": "it needs root and a network; tests/launch/test_slurm.py runs where these packages are",
}  # fmt: skip
CPU = ["backend.device=cpu"]  # for the torchruns: two processes cannot share a GPU


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The files that the commands name, and a small model under the name MODEL."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from tritune.trainer.model.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    for name in ("train.csv", "test.csv"):
        drink = "tea" if name == "train.csv" else "milk"  # a test split that stands in training is refused
        rows = [f"{'hot' if i % 2 else 'cold'} {drink} {i},{'warm' if i % 2 else 'cool'}" for i in range(16)]
        (folder / name).write_text("text,category\n" + "\n".join(rows) + "\n")
    harness.write_prompts(folder / "rows.jsonl", 24, seed=3)
    chats = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}] for i in range(200)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    return folder


def line_of(table: dict, command: str) -> str | None:
    return next((start for start in table if command.startswith(start)), None)


def test_there_are_commands_and_no_line_without_one():
    assert len(COMMANDS) > 20
    assert commands("text\n\n    tritune a  # b\n\n```sh\npip c\n```\ntritune d\n") == ["tritune a", "pip c"]
    for table in (ADDED, ELSEWHERE):
        assert {line_of(table, command) for command in COMMANDS} - {None} == set(table)
    assert not [c for c in COMMANDS if line_of(ELSEWHERE, c) is None and not c.startswith("tritune ")], (
        "none runs these"
    )


def test_the_commands_run_as_printed(workspace, monkeypatch, capfd):
    """In one process and one folder, since the later ones read what the earlier wrote."""
    from tritune.launch.cli import main

    monkeypatch.chdir(workspace)
    for command in COMMANDS:
        if line_of(ELSEWHERE, command) is None:
            code = main([*shlex.split(command)[1:], *ADDED.get(line_of(ADDED, command) or "", [])])
            assert code == 0, f"{command}\n{capfd.readouterr().err}"
    assert (workspace / "runs/intents/report.html").is_file()
    assert len((workspace / "answers.jsonl").read_text().splitlines()) == 24
    assert (workspace / "merged/model.safetensors").is_file()
    assert (workspace / "runs/lora/export/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_proofs_run(workspace, monkeypatch):
    """As printed: without an end of training, with the length that verify.steps has by itself."""
    from tritune.launch.cli import main

    monkeypatch.chdir(workspace)
    proofs = [shlex.split(c)[1:] for c in COMMANDS if c.startswith("tritune verify")]
    assert [words[1] for words in proofs] == ["parity", "resume"]
    for words in proofs:
        assert main(words) == 0, words
        proof = json.loads((workspace / f"runs/proof/{words[1]}.json").read_text())
        assert proof["holds"]
        assert len(proof["steps"] if words[1] == "resume" else proof["reference"]) == 20


@pytest.mark.slow
def test_the_torchrun_command_runs(workspace):
    """With two processes in place of eight, and the small model in place of the hub's."""
    (command,) = [c for c in COMMANDS if c.startswith("torchrun --nproc-per-node 8")]
    words = shlex.split(command.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2"))
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:], *HUB_LLAMA, *CPU], cwd=workspace,
                         capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert (workspace / "runs/llama/summary.json").is_file()


@pytest.mark.slow
def test_the_watched_command_runs(workspace):
    (command,) = [c for c in COMMANDS if "launch.max_restarts=3" in c]
    words = [sys.executable, "-m", "tritune.launch.cli", *shlex.split(command)[1:]]
    out = subprocess.run(words, cwd=workspace, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert json.loads((workspace / "runs/two/environment.json").read_text())["world_size"] == 2
    assert (workspace / "runs/two/logs/rank-1.log").is_file()


@pytest.mark.slow
def test_two_machines_without_a_scheduler_train_what_one_does(workspace):
    """The two torchruns of the README, meeting on the loopback, beside one with both processes: the same bits."""
    (command,) = [c for c in COMMANDS if c.startswith("torchrun --nnodes=2")]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = command.replace("HOST", "127.0.0.1").replace("29500", port).replace("per-node=8", "per-node=1")
    extra = [*HUB_LLAMA, *CPU]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    jobs = []
    for node in ("0", "1"):
        words = shlex.split(command.replace("/shared/llama", "runs/two-machines"))
        words = [w.replace("--node-rank=0", f"--node-rank={node}") for w in words[1:]]
        jobs.append(subprocess.Popen([*torchrun, *words, *extra], cwd=workspace, env=env))
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    one = [
        "--standalone",
        "--nproc-per-node=2",
        *[w for w in words if not w.startswith("--n") and not w.startswith("--master")],
    ]
    one = [w.replace("runs/two-machines", "runs/one-machine") for w in one]
    subprocess.run([*torchrun, *one, *extra], cwd=workspace, env=env, check=True, timeout=300)
    both = [harness.rows(workspace / "runs" / name) for name in ("two-machines", "one-machine")]
    assert len(both[0]) > 4
    assert [(r["loss"], r["grad_norm"], r["batch"]) for r in both[0]] == [
        (r["loss"], r["grad_norm"], r["batch"]) for r in both[1]
    ]


def test_the_demo_is_what_make_demo_runs():
    """The Makefile starts the module that tests/launch/test_quickstart.py tests."""
    assert "-m tritune.launch.quickstart" in (ROOT / "Makefile").read_text()
