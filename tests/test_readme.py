"""README tells the truth: its file map is the tree's, and its commands are run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

SMALL = {
    "NUM_LAYERS": "2", "HIDDEN_SIZE": "64", "FFN_HIDDEN_SIZE": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
    "SEQ_LEN": "64", "TRAIN_ITERS": "4", "SAVE_INTERVAL": "2", "PRECISION": "fp32", "OMP_NUM_THREADS": "1"}
# The suite cannot run itself, and tests/neo runs the quickstart with fewer steps.
RUN_ELSEWHERE = ("bash tests/run.sh", "bash neo/scripts/quickstart.sh")


def tracked_files(repository: Path) -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, text=True, capture_output=True, check=True)
    return listed.stdout.split("\n")[:-1]


def bash_blocks(readme: Path) -> list[str]:
    """The commands of the file's bash blocks, continued lines joined, comments cut off."""
    text = readme.read_text(encoding="utf-8")
    joined = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [" ".join(line.split("#")[0].split()) for line in joined.splitlines() if line.split("#")[0].strip()]


def test_file_map_is_the_tree(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    section = text.split("## The house", 1)[1].split("\n## ", 1)[0]
    mapped = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    wanted = [name for name in tracked_files(repository)
              if name.endswith((".py", ".sh", ".yml", ".cpp", ".sbatch")) and not name.startswith("tests/")
              and not name.endswith("__init__.py")]
    assert sorted(mapped) == sorted(wanted)


@pytest.fixture(scope="module")
def clone(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files in a folder of their own, with a corpus, as a reader of the README has them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked_files(repository):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, folder / name)
    with open(folder / "my-corpus.json", "wb") as lines:
        for name in tracked_files(repository):
            if name.endswith(".py"):
                text = (repository / name).read_text(encoding="utf-8")
                lines.write(orjson.dumps({"text": text, "src": name}) + b"\n")
    return folder


def run(command: str, clone: Path, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "PYTHONPATH": str(clone), **variables}
    ran = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, text=True, timeout=600,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-4000:]}"
    return ran.stdout


@pytest.mark.parametrize("readme", ["README.md", "neo/README.md"])
def test_every_command_works_as_written(readme: str, clone: Path) -> None:
    """In the order of the page; what is not given there (shape, phase 2's start) comes by variables."""
    shutil.rmtree(clone / "out", ignore_errors=True)
    shutil.rmtree(clone / "checkpoints", ignore_errors=True)
    mixture = clone / "neo/scripts/mixture_cfg.yml"
    mixture.write_text(re.sub(r"SEQ_LEN: \d+", "SEQ_LEN: 64", mixture.read_text(encoding="utf-8")))
    first = clone / "checkpoints/first"
    converter = clone / "neo/scripts/converter_cfg.yml"
    converter.write_text(
        f"MEGATRON_CHECKPOINT_PATH: {first}/checkpoint\nHF_CHECKPOINT_PATH: {first}/hf\n"
        "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS: [0.000001, 1]\n", encoding="utf-8")
    for command in bash_blocks(clone / readme):
        if command in RUN_ELSEWHERE:
            continue
        variables = dict(SMALL)
        if command == "bash neo/scripts/pretrain_7b.sh":
            variables["OUTPUT_HOME"] = str(first)
        if "NUM_LAYERS=2" in command:
            variables = {"OMP_NUM_THREADS": "1"}
        run(command.replace("path/to/checkpoint", str(first / "checkpoint")), clone, **variables)
    assert (clone / "mixture.env").is_file()
    converted = sorted(path.name for path in (first / "hf").iterdir())
    assert len(converted) == 2, "two targets, two iterations"
