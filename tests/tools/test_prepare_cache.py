"""What training would trip over, or take on trust, is found ahead of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.indexed import IndexedTokens

TOOL = "tools/prepare_cache.py"


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny_dataset}{ending}", tmp_path / f"set{ending}")
    return tmp_path / "set"


def test_a_whole_mixture_is_said_to_be_whole(dataset: Path, tiny_dataset: Path, tiny_tokenizer: Path, run_tool):
    outcome = run_tool(TOOL, "--data-path", "1", dataset, "2.5", tiny_dataset, "1", dataset, "--tokenizer-model",
                       tiny_tokenizer, env={"COLUMNS": "200"})
    assert outcome.returncode == 0, outcome.stderr
    assert "2 sets are whole" in outcome.stdout and f"{IndexedTokens(dataset).n_tokens:,}" in outcome.stdout


def change(path: str, at: int, dtype: str, value: int) -> None:
    content = bytearray(Path(path).read_bytes())
    size = np.dtype(dtype).itemsize
    content[at:at + size] = np.array([value], dtype).tobytes()
    Path(path).write_bytes(content)


def damage_offsets(prefix: Path) -> None:
    change(f"{prefix}.idx", 34 + 4 * IndexedTokens(prefix).n_documents + 8, "<i8", 3)


def damage_documents(prefix: Path) -> None:
    change(f"{prefix}.idx", 34 + 12 * IndexedTokens(prefix).n_documents + 8, "<i8", 7)


def damage_token(prefix: Path) -> None:
    change(f"{prefix}.bin", 100, "<u2", 1000)


def damage_count(prefix: Path) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**manifest, "documents": 1}))


def damage_size(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-2])


def damage_name(prefix: Path) -> None:
    Path(f"{prefix}.bin").rename(f"{prefix}.bin.old")


@pytest.mark.parametrize("damage, sentence", [
    (damage_offsets, "set.idx: its sequences do not follow one another"),
    (damage_documents, "set.idx: its documents are not in order"),
    (damage_token, "set.bin: holds token 1000 near byte "), (damage_count, "set.json: counts 1 documents"),
    (damage_size, "set.bin: is "), (damage_name, "set.bin: No such file")])
def test_damage_is_named(damage, sentence: str, dataset: Path, tiny_tokenizer: Path, run_tool):
    damage(dataset)
    outcome = run_tool(TOOL, "--data-path", dataset, "--tokenizer-model", tiny_tokenizer)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and sentence in outcome.stderr and outcome.stderr.count("\n") == 1


def test_another_tokenizer_and_a_missing_mixture(dataset: Path, tmp_path: Path, run_tool):
    outcome = run_tool(TOOL, "--data-path", dataset, "--tokenizer-model", "neo/tokenizer.model")
    assert outcome.returncode == 2 and "was made with another tokenizer" in outcome.stderr
    outcome = run_tool(TOOL, "--mixture-env", tmp_path / "mixture.env")
    assert outcome.returncode == 2 and "mixture.env: No such file" in outcome.stderr


def test_help_says_that_there_is_no_cache(run_tool):
    assert "there is nothing to build" in run_tool(TOOL, "--help").stdout
