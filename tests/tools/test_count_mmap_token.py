"""The count is that of the file's own tokens, in the original's words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.indexed import IndexedWriter

TOOL = "tools/count_mmap_token.py"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "my-corpus_text_document", np.uint16) as writer:
        writer.add_documents(np.arange(1234), np.array([1000, 0, 234]))
    (tmp_path / "my-corpus_text_document.bin").unlink()  # the .idx is enough
    return tmp_path / "my-corpus_text_document"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
@pytest.mark.parametrize("flag", ["--mmap_path", "--mmap-path"])
def test_one_set_is_one_line(flag: str, ending: str, prefix: Path, run_tool):
    outcome = run_tool(TOOL, flag, f"{prefix}{ending}")
    assert (outcome.returncode, outcome.stdout) == (0, "Total number of tokens:  1234\n"), outcome.stderr


def test_several_sets_get_a_table(prefix: Path, run_tool):
    outcome = run_tool(TOOL, "--mmap_path", prefix, f"{prefix}.bin", env={"COLUMNS": "200"})
    *table, total = outcome.stdout.splitlines()
    assert total == "Total number of tokens:  2468"
    assert sum(str(prefix) in line and "1,234" in line for line in table) == 2


@pytest.mark.parametrize("flags, sentence", [
    (("--mmap_path", "none"), "none.idx: No such file"),
    (("--mmap_path", "README"), "README.idx: No such file"),
    (("--mmap-paht", "x"), "unknown flag --mmap-paht; the nearest known one is --mmap-path"),
    ((), "required: --mmap-path"),
])
def test_a_mistake_is_a_sentence(flags: tuple[str, ...], sentence: str, run_tool):
    outcome = run_tool(TOOL, *flags)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and sentence in outcome.stderr
    assert outcome.stderr.count("\n") == 1
