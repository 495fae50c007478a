"""The Slurm array, task by task as Slurm would start them: the same bytes as one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "neo/scripts/preprocess.sbatch"


@pytest.fixture
def task(repository: Path, tmp_path: Path, tiny_tokenizer: Path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {number} " * 20}) + "\n" for number in range(50)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"INPUT": f"{tmp_path}/in/a.jsonl {tmp_path}/in/b*", "OUTPUT_PREFIX": f"{tmp_path}/out",
                        "TOKENIZER_MODEL_PATH": str(tiny_tokenizer), "PYTHON": sys.executable}
        return subprocess.run(["bash", SCRIPT], cwd=repository, text=True, capture_output=True,
                              env={**environment, **variables})

    return run


def test_bash_reads_it(repository: Path):
    assert subprocess.run(["bash", "-n", SCRIPT], cwd=repository).returncode == 0


def test_the_tasks_of_an_array_make_one_set(task, tmp_path: Path, tiny_tokenizer: Path, run_tool):
    for number in (1, 2, 3):
        outcome = task(SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_COUNT="3")
        assert outcome.returncode == 0, outcome.stderr
    assert task(SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="1", SHARDS="3").returncode == 0
    assert run_tool("tools/merge_datasets.py", "--output-prefix", tmp_path / "out").returncode == 0
    run_tool("tools/preprocess_data.py", "--input", tmp_path / "in", "--output-prefix", tmp_path / "one",
             "--tokenizer-model", tiny_tokenizer, "--append-eod")
    for ending in ("bin", "idx"):
        assert ((tmp_path / f"out_text_document.{ending}").read_bytes()
                == (tmp_path / f"one_text_document.{ending}").read_bytes())


@pytest.mark.parametrize("variables, sentence", [
    ({"INPUT": ""}, "INPUT is not set"), ({"OUTPUT_PREFIX": ""}, "OUTPUT_PREFIX is not set"),
    ({}, "this is a task of an array"),
    ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "1"}, "SHARDS is not set"),
    ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "3"}, "task 0 is none of 3 shards"),
    ({"SLURM_ARRAY_TASK_ID": "4", "SHARDS": "3"}, "task 4 is none of 3 shards"),
    ({"SLURM_ARRAY_TASK_ID": "1", "SHARDS": "3", "SLURM_SUBMIT_DIR": "/"}, "/ is not the repository's folder")])
def test_a_mistake_is_a_sentence(variables: dict[str, str], sentence: str, task):
    outcome = task(**variables)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and sentence in outcome.stderr and outcome.stderr.count("\n") == 1
