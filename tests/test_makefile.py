"""make setup and make gpu, with a pip and an nvidia-smi that only pretend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
# The virtual environment's: pip notes what it is asked for, and cannot build Transformer Engine.
case "$*" in
  *"pip "*) echo "$*" >>pip.txt; case "$*" in *transformer-engine*) echo "error: no nvcc"; exit 1 ;; esac ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """The Makefile beside an empty package, and a python whose `-m venv` makes what pretends."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "prism_mcore").mkdir()
    (tmp_path / "prism_mcore" / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "inside", PYTHON.format(python=sys.executable))
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\n")
    venv = 'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp inside "$3/bin/python"; exit; fi'
    executable(tmp_path / "python", f'#!/bin/sh\n{venv}\nexec {sys.executable} "$@"\n')
    return tmp_path


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tree)}
    command = ["make", *arguments, "PYTHON=./python"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_setup_needs_no_gpu_package_and_make_gpu_survives_each(tree):
    done = make(tree, "setup")
    assert done.returncode == 0, done.stderr
    assert "make gpu adds" in done.stdout and "transformer-engine" not in (tree / "pip.txt").read_text()
    done = make(tree, "gpu")
    assert done.returncode == 0, done.stderr
    asked = (tree / "pip.txt").read_text()
    assert all(
        name in asked
        for name in ("transformer-engine[pytorch,core_cu13]==2.11.0", "flash-attn", "causal-conv1d", "mamba-ssm")
    )
    assert (
        "error: no nvcc" in done.stdout
        and "not installed: transformer-engine[pytorch,core_cu13]==2.11.0;" in done.stdout
    )
    assert done.stdout.count("  installed") == 3


def test_an_environment_that_cannot_be_used_is_called_stale(tree, tmp_path):
    assert make(tree, "setup").returncode == 0
    executable(tree / ".venv" / "bin" / "python", "#!/nowhere/python\n")  # its Python is gone
    for target in ("setup", "test"):
        done = make(tree, target)
        assert done.returncode != 0 and ".venv is stale" in done.stdout and "make clean" in done.stdout
    (tree / ".venv" / "installed").unlink()  # also before it was whole
    assert ".venv is stale" in make(tree, "setup").stdout
    assert make(tree, "clean").returncode == 0 and not (tree / ".venv").exists()
    assert make(tree, "setup").returncode == 0


def test_an_old_python_is_told_what_is_needed(tree):
    old = f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"'
    executable(tree / "python", f"#!/bin/sh\n{old}\n")
    done = make(tree, "setup")
    assert done.returncode != 0 and "needs Python >= 3.11, got" in done.stderr and not (tree / ".venv").exists()
