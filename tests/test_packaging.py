"""What is installed: the wheel's contents, its place beside megatron-core, and what it says it needs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("pyproject.toml", "setup.py", "requirements.txt", "LICENSE", "NOTICE", "README.md", "megatron",
            "neo", "tools", "tests")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")

# The names under which distributions are imported, where the two differ.
IMPORTED_AS = {"megatron-core": "megatron", "pyyaml": "yaml", "flash-attn-4": "flash_attn",
               "nvidia-cutlass-dsl": "cutlass", "quack-kernels": "quack", "transformer-engine": "transformer_engine"}
# NVIDIA's apex comes from no registry: it is used where the machine has it.
FOUND_BY_IMPORT_ONLY = {"apex"}

IMPORT_BOTH = """
import megatron.pretrain.errors, megatron.core
print(megatron.pretrain.errors.__file__)
"""
# Finding the engine takes no time, importing it takes seconds.
FIND_BOTH = """
import importlib.util, megatron.pretrain.errors
assert importlib.util.find_spec("megatron.core")
print(megatron.pretrain.errors.__file__)
"""


def checked(command: list[str | Path], cwd: Path) -> str:
    """The standard output of a command that has to succeed, run without the caller's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, text=True,
                             capture_output=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds, so that building leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checked([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources], folder)
    [built] = folder.glob("*.whl")
    return built


def make_environment(folder: Path) -> Path:
    """A new environment's Python: nothing of ours in it, this one's packages (megatron-core) in sight.

    A path line of a .pth file adds a folder to sys.path and does not read the .pth files in it, so the
    editable install that the suite runs on stays out of sight.
    """
    checked([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    package = ROOT / "megatron" / "pretrain"
    native = f"megatron/pretrain/data/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert names == {native, *(str(path.relative_to(ROOT)) for path in package.rglob("*.py"))}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_wheel_imports_beside_megatron_core(wheel: Path, tmp_path: Path):
    python = make_environment(tmp_path / "empty")
    with pytest.raises(AssertionError, match="No module named 'megatron.pretrain'"):
        checked([python, "-c", FIND_BOTH], tmp_path)
    checked([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], tmp_path)
    ours = checked([python, "-c", IMPORT_BOTH], tmp_path).strip()
    assert Path(ours).is_relative_to(tmp_path / "empty")


def test_without_a_compiler_the_wheel_is_built_without_the_native_encoder(
        sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone = shutil.copytree(sources, tmp_path / "clone", ignore=shutil.ignore_patterns("build", "*.so"))
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-such-compiler")
    monkeypatch.delenv("REQUIRE_NATIVE", raising=False)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, clone]
    checked(build, tmp_path)
    [built] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if "_native." in name]
    monkeypatch.setenv("REQUIRE_NATIVE", "1")
    with pytest.raises(AssertionError, match="which REQUIRE_NATIVE=1 forbids"):
        checked(build, tmp_path)


def test_an_editable_install_imports_from_any_folder(sources: Path, tmp_path: Path):
    python = make_environment(tmp_path / "editable")
    checked([*PIP, "--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation",
             "--editable", sources], tmp_path)
    for folder in (Path("/"), tmp_path, sources, sources / "megatron"):
        ours = checked([python, "-c", FIND_BOTH], folder).strip()
        assert Path(ours).resolve() == (sources / "megatron" / "pretrain" / "errors.py").resolve()
    assert list((sources / "megatron" / "pretrain" / "data").glob("_native*.so"))


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in fields.get_all("Requires-Dist")]


def test_requirements_txt_says_what_pyproject_says(wheel: Path):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert listed == {str(need) for need in requirements_of(wheel) if "extra ==" not in str(need.marker)}


def third_party_imports() -> Iterator[tuple[str, Path]]:
    """The first part of every absolute import in what we ship, and the file that has it."""
    folders = [ROOT / name for name in ("megatron", "neo", "tools")]
    files = [ROOT / "pretrain_gpt.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    for path in files:
        own = {neighbour.stem for neighbour in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            yield from ((name.split(".")[0], path) for name in names if name.split(".")[0] not in own)


def test_every_import_is_declared(wheel: Path):
    declared = {IMPORTED_AS.get(need.name, need.name) for need in requirements_of(wheel)}
    known = declared | FOUND_BY_IMPORT_ONLY | set(sys.stdlib_module_names)
    unknown = {f"{path.relative_to(ROOT)} imports {name}" for name, path in third_party_imports()
               if name not in known}
    assert not unknown


TOOLS = [*sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "neo" / "scripts").glob("*.py"))]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_a_tool_without_the_install_says_how_to_install(tool: Path, tmp_path: Path):
    python = tmp_path / "bare" / "bin" / "python"
    checked([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run([python, tool, "--help"], cwd=tmp_path, env=environment, text=True,
                             capture_output=True)
    assert outcome.returncode != 0
    assert "pip install -e ." in outcome.stderr
    assert "Traceback" not in outcome.stderr
