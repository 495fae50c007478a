"""`bash neo/scripts/batch_convert_ckpt.sh`, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_tokenizer, run_tool, repository) -> Path:
    """Iterations 100, 200 and 300 of a run, with 0.0001024B tokens each hundred; 400 was cut off."""
    root = tmp_path_factory.mktemp("run") / "checkpoint"
    outcome = run_tool(repository / "tests/export/write_checkpoint.py", root, tiny_tokenizer, 100, 200, 300)
    assert outcome.returncode == 0, outcome.stderr
    (root / "iter_0000400").mkdir()
    return root


@pytest.fixture
def script(repository, tmp_path):
    """Run the script in `tmp_path`."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(repository / "neo/scripts/batch_convert_ckpt.sh"), *map(str, arguments)],
            cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable, "COLUMNS": "200"},
            text=True, capture_output=True, timeout=300)

    return run


@pytest.fixture
def config(checkpoints, tiny_tokenizer, tmp_path) -> Path:
    path = tmp_path / "cfg.yml"
    path.write_text(
        f"MEGATRON_CHECKPOINT_PATH: {checkpoints}\nHF_CHECKPOINT_PATH: hf\nTOKENIZER_DIR: {tiny_tokenizer}\n"
        "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS: [0.0001, 0.000105, 0.00025]\n"
        "VOCAB_SIZE: 1000\nSEQ_LEN: 128\nGB: 8\nBF16: true\n")
    return path


def iteration_of(folder: Path) -> int:
    return json.loads((folder / "export.json").read_text())["iteration"]


def folders(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "hf")) if (tmp_path / "hf").exists() else []


def test_a_batch(script, config, checkpoints, tmp_path):
    planned = script("--config", config, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("would be converted") == 2
    assert folders(tmp_path) == []

    done = script("--config", config)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        f"Closest checkpoint to {wanted} tokens: {checkpoints}/{name}, corresponding tokens: {tokens}, "
        f"diff: {difference}"
        for wanted, name, tokens, difference in (
            ("0.000100B", "iter_0000100", "0.000102B", "0.00000240B"),
            ("0.000105B", "iter_0000100", "0.000102B", "0.00000260B"),
            ("0.000250B", "iter_0000200", "0.000205B", "0.0000452B"))]
    assert done.stdout.count("converted, ") == 2 and done.stdout.count("the same") == 1
    assert "iter_0000400 is left out" in done.stderr
    assert folders(tmp_path) == ["iter_0000100", "iter_0000200"]
    assert [iteration_of(tmp_path / "hf" / name) for name in folders(tmp_path)] == [100, 200]
    assert json.loads((tmp_path / "hf/iter_0000100/config.json").read_text())["torch_dtype"] == "bfloat16"

    again = script("--config", config)
    assert again.returncode == 2
    assert "error: hf/iter_0000100 exists: remove it, or let --skip-existing leave it" in again.stderr

    config.write_text(config.read_text().replace("0.00025]", "0.00025, 1]"))
    more = script("--config", config, "--skip-existing")
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("exists, skipped") == 2 and more.stdout.count("converted, ") == 1
    assert "diff: 1.00B" in more.stdout
    assert folders(tmp_path) == ["iter_0000100", "iter_0000200", "iter_0000300"]


def test_folders_named_by_billions(script, config, tmp_path):
    outcome = script("--config", config, "--rename-hf-by-billions")
    assert outcome.returncode == 0, outcome.stderr
    assert folders(tmp_path) == ["0.0001B", "0.0002B"]
    assert [iteration_of(tmp_path / "hf" / name) for name in folders(tmp_path)] == [100, 200]


def test_one_checkpoint_without_a_configuration(script, checkpoints, tiny_tokenizer, tmp_path):
    outcome = script(
        "--megatron-dir", checkpoints / "iter_0000200", "--hf-dir", "models/mine", "--vocab-size", 1000,
        "--tokenizer-dir", tiny_tokenizer, "--max-shard-size", "100KB", "--dtype", "fp16")
    assert outcome.returncode == 0, outcome.stderr
    assert iteration_of(tmp_path / "models/mine") == 200
    assert (tmp_path / "models/mine/model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "models/mine/config.json").read_text())["torch_dtype"] == "float16"


def test_the_script_reads_its_own_configuration_and_writes_another(script, tmp_path):
    by_default = script("--dry-run")
    assert by_default.returncode == 2
    assert "error: MEGATRON_CHECKPOINT_PATH checkpoints/" in by_default.stderr
    assert script("--generate-config", "new.yml").returncode == 0
    assert "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS" in (tmp_path / "new.yml").read_text()
    again = script("--generate-config", "new.yml")
    assert again.returncode == 2 and "new.yml exists" in again.stderr


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--skip-existin"], "unknown flag --skip-existin; the nearest known one is --skip-existing"),
    (["--megatron-dir", "x"], "--megatron-dir and --hf-dir belong together"),
    (["--megatron-dir", "absent", "--hf-dir", "y"], "absent is not a folder"),
    (["--megatron-dir", "x", "--hf-dir", "y", "--rename-hf-by-billions"], "give one of the two"),
    (["--config", "cfg.yml", "--max-shard-size", "big"], "--max-shard-size: 'big' is no size"),
    (["--config", "cfg.yml", "--vocab-size", "999"], "no trained row is dropped"),
    (["--config", "cfg.yml", "--tokenizer-dir", "absent"], "absent does not exist"),
])
def test_a_mistake_gets_a_sentence_and_leaves_nothing(arguments, sentence: str, script, config, tmp_path):
    outcome = script(*arguments)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: ") and sentence in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert os.listdir(tmp_path) == ["cfg.yml"]


def test_help_shows_the_way(script):
    outcome = script("--help")
    assert outcome.returncode == 0
    for flag in ("--config", "--rename-hf-by-billions", "--skip-existing", "--dry-run", "--generate-config",
                 "--megatron-dir"):
        assert flag in outcome.stdout


def test_several_at_once_and_verified(script, config, tmp_path):
    outcome = script("--config", config, "--jobs", 2, "--verify")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("converted, ") == 2
    assert outcome.stdout.count("21 tensors verified, logits within") == 2
    assert [iteration_of(tmp_path / "hf" / name) for name in folders(tmp_path)] == [100, 200]


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_that_fails_keeps_no_other_back(jobs: int, script, config, checkpoints, tmp_path):
    """A bit that flipped amid the elements is seen only when they are read."""
    copied = tmp_path / "checkpoint"
    shutil.copytree(checkpoints, copied)
    shard = copied / "iter_0000100/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 8] ^= 1
    shard.write_bytes(content)
    config.write_text(config.read_text().replace(str(checkpoints), str(copied)))
    outcome = script("--config", config, "--jobs", jobs, "--verify")
    assert outcome.returncode == 2
    assert "is not what was saved there" in outcome.stderr.splitlines()[-1]
    assert outcome.stdout.count("failed") == 1 and outcome.stdout.count("converted, ") == 1
    assert os.listdir(tmp_path / "hf") == ["iter_0000200"]
