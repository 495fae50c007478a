"""What setup_env.sh refuses, and what it leaves alone. (A whole set-up is what tests/run.sh begins with.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_A_PYTHON = "#!/bin/sh\necho Python 3.9.1\nexit 1\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script where a clone has it."""
    scripts = tmp_path / "clone" / "neo" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "neo" / "scripts" / "setup_env.sh", scripts)
    return tmp_path / "clone"


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "NEO_PYTHON")}
    return subprocess.run(["bash", str(clone / "neo" / "scripts" / "setup_env.sh")], text=True,
                          env={**inherited, **environment}, capture_output=True)


def add_distribution(environment: Path, name: str, version: str) -> None:
    [packages] = environment.glob("lib/python3*/site-packages")
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_no_suitable_python_is_said_and_nothing_is_made(clone: Path):
    outcome = set_up(clone, NEO_PYTHON="/bin/false")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: no Python 3.10, 3.11 or 3.12 found (looked for /bin/false)")
    assert not (clone / ".venv").exists()


def test_the_torch_of_an_environment_that_is_not_active_is_left_to_it(clone: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True)
    add_distribution(tmp_path / "other", "torch", "2.13.0")
    made = tmp_path / "made"
    script = f"""
        source '{clone}/neo/scripts/setup_env.sh'
        [[ "$(torch_of '{tmp_path}/other/bin/python')" == "fit 2.13.0" ]] || exit 3
        NEO_PYTHON='{tmp_path}/other/bin/python' NEO_ENVIRONMENT='{made}'
        make_environment && torch_of '{made}/bin/python'"""
    outcome = subprocess.run(["bash", "-c", script], text=True, capture_output=True)
    assert outcome.returncode == 0, outcome.stderr
    said, torch = outcome.stdout.splitlines()
    assert "and its torch" not in said and torch == "none"
    assert "include-system-site-packages = false" in (made / "pyvenv.cfg").read_text()


def test_an_active_environment_of_another_python_is_refused(clone: Path, tmp_path: Path):
    python = tmp_path / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(NOT_A_PYTHON)
    python.chmod(0o755)
    outcome = set_up(clone, VIRTUAL_ENV=str(tmp_path / "other"))
    assert outcome.returncode == 2
    assert f"error: the environment {tmp_path}/other has Python 3.9.1, NEO needs" in outcome.stderr


def test_an_installed_torch_that_is_too_old_is_refused_not_replaced(clone: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "active")], check=True)
    add_distribution(tmp_path / "active", "torch", "2.5.1")
    outcome = set_up(clone, VIRTUAL_ENV=str(tmp_path / "active"))
    assert outcome.returncode == 2
    assert "has torch 2.5.1, NEO needs 2.11 or newer and never replaces an installed one" in outcome.stderr


def test_pips_output_is_shown_when_it_fails(clone: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "active")], check=True)
    add_distribution(tmp_path / "active", "torch", "2.13.0")
    for name in ("setup.py", "requirements.txt"):
        (clone / name).touch()
    (clone / "pyproject.toml").write_text("[project\n")
    outcome = set_up(clone, VIRTUAL_ENV=str(tmp_path / "active"))
    assert outcome.returncode == 1
    assert "TOMLDecodeError" in outcome.stderr
    assert outcome.stderr.rstrip().endswith(f"the whole output is in {tmp_path}/active/neo-setup.log")
    assert not (tmp_path / "active" / ".neo-setup").exists()
