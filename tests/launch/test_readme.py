"""Every command of the README, run as it stands there, on small files. A command without a case here fails."""

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
COMMANDS = re.findall(
    r"^    ((?:make|tritune|torchrun|\.) .*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE
)
SMALL = ["train.max_steps=2", "data.max_length=64", "train.batch_size=4", "backend.device=cpu"]
# What a case adds, so that it fits these files; hub models become the small one.
ADDED = {
    "tritune train experiment=banking77": SMALL,
    "tritune train experiment=qwen3_0_6b_sft": [*SMALL, "model.path=MODEL", "data.validation_share=0.3"],
    "tritune train method=lora": SMALL,
    "tritune audit objective=sft": ["data.max_length=64"],
    "tritune train objective=sft model.path=MODEL data.sources": SMALL,
    "tritune train objective=sft model.path=MODEL data.train=rows.jsonl data.streaming": [*SMALL, "data.pack_window=4"],
    "tritune evaluate run.dir=runs/intents": [],
    "tritune evaluate model.path=runs/lora/export": ["data.max_length=64", "backend.device=cpu"],
    "tritune generate run.dir=runs/lora": ["backend.device=cpu"],
    "tritune generate model.path=runs/lora/export": ["generate.max_new_tokens=8", "backend.device=cpu"],
    "tritune export run.dir=runs/lora": [],
    "tritune report run.dir=runs/lora": [],
    "tritune config experiment=banking77": [],
    "tritune doctor\n": ["backend.device=cpu"],
    "tritune submit experiment=llama3_8b_lora": [
        *SMALL,
        "model.path=MODEL",
        "model.pad_token=null",
        "run.dir=runs/job",
    ],
}
ELSEWHERE = {
    "tritune verify": "test_the_proofs_run, which is slow",
    "tritune doctor launch=slurm": "tests/launch/test_doctor.py, on a virtual cluster",
    "tritune train method=lora model.path=MODEL data.train=rows.jsonl train.epochs=2 launch.num_procs=2": "the next test",
    "torchrun --nnodes=2": "the one after it",
    "make demo": "tests/launch/test_quickstart.py, and by hand in a fresh clone",
    "make test": "this very run",
    ". .venv/bin/activate": "by hand in a fresh clone",
    "tritune generate run.dir=runs/quickstart/tuned": "tests/launch/test_quickstart.py",
}
TORCHRUN = "torchrun --nproc-per-node 8 -m tritune.trainer experiment=llama3_8b_lora"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The files that the commands name, and a small model under the name MODEL."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from tritune.trainer.tokenizer import byte_tokenizer

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
    harness.write_prompts(folder / "rows.jsonl", 8, seed=3)
    chats = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}] for i in range(16)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    return folder


def case(command: str) -> str | None:
    return None if elsewhere(command) else next((start for start in ADDED if f"{command}\n".startswith(start)), None)


def elsewhere(command: str) -> bool:
    return any(command.startswith(start) for start in ELSEWHERE)


def test_every_command_has_a_case():
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        assert case(command) or elsewhere(command) or command.startswith(TORCHRUN), command
    assert len({case(c) for c in COMMANDS} - {None}) == len(ADDED), "a case without its command"


def test_the_commands_run_in_the_readme_s_order(workspace, monkeypatch, capfd):
    """In one process and one folder, since the later ones read what the earlier wrote."""
    from tritune.launch.cli import main

    monkeypatch.chdir(workspace)
    for command in COMMANDS:
        start = case(command)
        if start is None:
            continue
        arguments = [*shlex.split(command)[1:], *ADDED[start]]
        code = main(arguments)
        out = capfd.readouterr()
        assert code == 0, f"{command}\n{out.err}"
    assert (workspace / "runs/intents/report.html").is_file()
    assert len((workspace / "answers.jsonl").read_text().splitlines()) == 8
    assert (workspace / "merged/model.safetensors").is_file()
    assert (workspace / "runs/lora/export/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_proofs_run(workspace, monkeypatch):
    """With a few steps; long enough to be killed."""
    from tritune.launch.cli import main

    monkeypatch.chdir(workspace)
    proofs = [shlex.split(c)[1:] for c in COMMANDS if c.startswith("tritune verify")]
    assert [words[1] for words in proofs] == ["parity", "resume"]
    for words in proofs:
        steps = ["verify.steps=4"] if words[1] == "parity" else ["verify.steps=40", "verify.kill_at=6"]
        assert main([*words, *SMALL, *steps]) == 0, words
        assert json.loads((workspace / f"runs/proof/{words[1]}.json").read_text())["holds"]


@pytest.mark.slow
def test_the_torchrun_command_runs(workspace):
    """With two processes in place of eight, and the small model in place of the hub's."""
    (command,) = [c for c in COMMANDS if c.startswith(TORCHRUN)]
    words = shlex.split(command.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2"))
    extra = [*SMALL, "model.path=MODEL", "model.pad_token=null", "data.validation_share=0.3"]
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:], *extra], cwd=workspace,
                         capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert (workspace / "runs/llama/summary.json").is_file()


@pytest.mark.slow
def test_the_watched_command_runs(workspace):
    (command,) = [c for c in COMMANDS if "launch.max_restarts=3" in c]
    words = [sys.executable, "-m", "tritune.launch.cli", *shlex.split(command)[1:], *SMALL]
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
    extra = [*SMALL, "model.path=MODEL", "model.pad_token=null", "export.enabled=false", "data.validation_share=0.3"]
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
    assert len(both[0]) == 2
    assert [(r["loss"], r["grad_norm"], r["batch"]) for r in both[0]] == [
        (r["loss"], r["grad_norm"], r["batch"]) for r in both[1]
    ]


def test_the_demo_is_what_make_demo_runs():
    """The Makefile starts the module that tests/launch/test_quickstart.py tests."""
    assert "-m tritune.launch.quickstart" in (ROOT / "Makefile").read_text()
