"""The house's own rules, kept by reading its source: who imports whom, how long things are, what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for folder in ("trainer", "kernels", "launch") for p in (ROOT / folder).rglob("*.py"))
MAX_LINES = 350
MAX_FIT_LINES = 90


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("tritune", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere in it, also inside functions; for `from a import b`, both a and
    a.b."""
    found = set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return {f for f in found if f == "tritune" or f.startswith("tritune.")}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def files_of(package: str) -> list[Path]:
    return [p for p in FILES if within(module_of(p), f"tritune.{package}")]


def test_there_is_something_to_read():
    assert len(FILES) > 30
    assert imports(ROOT / "trainer" / "loop.py") > {"tritune.trainer.run.state", "tritune.trainer.data.loader"}


def test_kernels_import_nothing_of_the_trainer():
    assert files_of("kernels")
    for path in files_of("kernels"):
        wrong = {m for m in imports(path) if not within(m, "tritune.kernels") and m != "tritune"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


# Rooms that know nothing of those after them, and what all may know.
COMMON = ["errors", "shown", "redact", "regular", "batch", "torch_api"]
AXES = ["methods", "objectives", "backends", "data", "checkpoint"]
BELOW = {"config": [], "parallel": ["config"]}
WIRING = ["build", "loop", "finish", "open", "verbs", "__main__"]
READERS = ["evaluation", "export", "audit", "report", "tracking", "verify"]


@pytest.mark.parametrize("room", BELOW)
def test_config_and_ranks_know_nothing_above_them(room):
    known = [f"tritune.trainer.{name}" for name in (*COMMON, *BELOW[room], room)] + ["tritune.kernels"]
    paths = files_of(f"trainer.{room}")
    assert paths
    for path in paths:
        wrong = {m for m in imports(path) if not any(within(m, k) for k in known)} - {"tritune.trainer", "tritune.conf"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("room", ["model", *AXES])
def test_rooms_below_the_wiring_do_not_know_it(room):
    forbidden = [f"tritune.trainer.{name}" for name in (*WIRING, *READERS)] + ["tritune.launch"]
    paths = files_of(f"trainer.{room}")
    assert paths
    for path in paths:
        wrong = {m for m in imports(path) if any(within(m, f) for f in forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("axis", AXES)
def test_axes_do_not_know_one_another(axis):
    """What composes freely: any method with any objective, backend, data and checkpoint. `build.py` alone wires
    them."""
    forbidden = [f"tritune.trainer.{other}" for other in AXES if other != axis]
    forbidden += ["tritune.trainer.build", "tritune.trainer.loop", "tritune.trainer.finish", "tritune.trainer.__main__"]
    paths = files_of(f"trainer.{axis}")
    assert paths
    for path in paths:
        wrong = {m for m in imports(path) if any(within(m, f) for f in forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_launcher_only_starts_processes():
    heavy = [f"tritune.trainer.{name}" for name in ("build", "loop", "model.scorer", "model.load", "data", "methods")]
    for path in files_of("launch"):
        wrong = {m for m in imports(path) if any(within(m, h) for h in heavy)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_fit_reads_as_a_page():
    (fit,) = [n for n in tree(ROOT / "trainer" / "loop.py").body if isinstance(n, ast.FunctionDef) and n.name == "fit"]
    assert fit.end_lineno - fit.lineno + 1 <= MAX_FIT_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_namespace_has_no_files_that_would_shadow_it():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tritune").exists()
    assert not (ROOT / "__init__.py").exists()


def is_broad(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in names)


def swallows(handler: ast.ExceptHandler) -> bool:
    """Does nothing with the error: only pass, ..., continue, or a return of a constant."""

    def idle(node: ast.stmt) -> bool:
        if isinstance(node, ast.Pass | ast.Continue | ast.Break):
            return True
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        return isinstance(node, ast.Return) and (node.value is None or isinstance(node.value, ast.Constant))

    return is_broad(handler.type) and all(idle(n) for n in handler.body)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_error_is_swallowed(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: a bare except"
            assert not swallows(node), f"{path.name}:{node.lineno}: an error of any kind is dropped without a word"
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "suppress":
            assert not any(is_broad(a) for a in node.args), f"{path.name}:{node.lineno}: suppress(Exception)"


def test_the_check_for_swallowed_errors_sees_one():
    bad = ["try: f()\nexcept Exception: pass", "try: f()\nexcept (ValueError, Exception):\n    return None"]
    for source in bad:
        (handler,) = [
            n
            for n in ast.walk(ast.parse(f"def g():\n    {source.replace(chr(10), chr(10) + '    ')}"))
            if isinstance(n, ast.ExceptHandler)
        ]
        assert swallows(handler)
    (fine,) = [n for n in ast.walk(ast.parse("try: f()\nexcept OSError: pass")) if isinstance(n, ast.ExceptHandler)]
    assert not swallows(fine)


def loaded_after(statement: str) -> set[str]:
    """Names of all modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", timeout=120)
    return set(json.loads(out.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["config", "errors", "config.compose", "run.state"])
def test_the_config_comes_without_torch(module):
    """`--help` and every refusal of a config answer at once."""
    modules = loaded_after(f"import tritune.trainer.{module}")
    assert f"tritune.trainer.{module}" in modules
    assert not modules & {"torch", "transformers", "datasets"}


def test_the_command_line_comes_without_torch():
    assert not loaded_after("import tritune.launch.cli") & {"torch", "transformers", "datasets"}


def test_importing_everything_touches_no_device_and_loads_nothing_idle():
    statement = (
        "import torch\n"
        "def refuse(*a, **k): raise AssertionError('importing initialised CUDA')\n"
        "torch.cuda._lazy_init = torch.cuda.init = refuse\n"
        "import tritune.trainer.build, tritune.trainer.finish, tritune.trainer.__main__\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.distributed.is_initialized()"
    )
    modules = loaded_after(statement)
    assert "tritune.trainer.build" in modules
    assert not modules & {"datasets", "wandb", "matplotlib", "deepspeed", "peft", "sklearn"}
