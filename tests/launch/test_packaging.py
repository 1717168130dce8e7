"""Installs and runs from another folder, editable and as a wheel, with and without Hugging Face's `kernels` package.

transformers asks whether a package named `kernels` can be imported. Were our folder a package, it would be taken for
Hugging Face's and every model import would fail; were our wheel flat, `pip install kernels` would overwrite it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import today

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["model=tiny", "train.max_steps=2", "train.batch_size=4", "backend.device=cpu", "run.dir=run"]


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("tritune-*.whl"))


@pytest.fixture(scope="session")
def hf_kernels(tmp_path_factory) -> Path:
    """Hugging Face's own `kernels` distribution, unpacked in a folder."""
    folder = tmp_path_factory.mktemp("kernels")
    try:
        pip("install", "--no-deps", "--target", str(folder), "kernels")
    except subprocess.CalledProcessError:
        pytest.skip("Hugging Face's kernels package cannot be had from the registry")
    return folder


def python(code_or_args: list[str], cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": ""}
    return subprocess.run(
        [sys.executable, *code_or_args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_editable_imports_from_another_folder(tmp_path):
    out = python(
        ["-c", "import tritune.kernels.lora, tritune.launch.cli, tritune.conf; print(tritune.conf.__file__)"], tmp_path
    )
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip()) == ROOT / "conf" / "__init__.py"


def test_wheel_holds_every_module_option_and_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("trainer", "kernels", "launch", "conf"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".j2") and "__pycache__" not in path.parts:
                assert f"tritune/{path.relative_to(ROOT)}" in names
    assert "tritune/conf/README.md" in names, "where `tritune --help` says that every key is"
    assert not [n for n in names if n.split("/")[0] in ("kernels", "trainer", "conf", "launch", "tests")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "with_kernels"), today.some([(f, k) for f in ("editable", "wheel") for k in (False, True)], 2, "packaging")
)
def test_trains_from_another_folder(tmp_path, sft_file, wheel, hf_kernels, form, with_kernels):
    paths = []
    if form == "wheel":
        site = tmp_path / "site"
        pip("install", "--no-deps", "--target", str(site), str(wheel))
        paths.append(site)
    if with_kernels:
        paths.append(hf_kernels)
    where = python(["-c", "import tritune.trainer, importlib.util as u; print(tritune.trainer.__file__);"
                    "print(u.find_spec('kernels') is not None)"], tmp_path, *paths)  # fmt: skip
    origin, has_kernels = where.stdout.split()
    assert Path(origin).is_relative_to(tmp_path / "site" if form == "wheel" else ROOT)
    assert has_kernels == str(with_kernels)
    out = python(["-m", "tritune.trainer", *TRAIN, f"data.train={sft_file}", "data.max_length=160"], tmp_path, *paths)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_real_kernels_package_wins_in_the_checkout(hf_kernels):
    """Started in the checkout, where the current folder is searched first, `kernels` is still Hugging Face's."""
    out = python(["-c", "import importlib.util as u; print(u.find_spec('kernels').origin);"
                  "from transformers import LlamaForCausalLM"], ROOT, hf_kernels)  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip()).is_relative_to(hf_kernels)
