"""What the tool shows is what the set holds."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.indexed import IndexedTokens, IndexedWriter
from megatron.pretrain.data.inspect import Bin, document_lengths, document_tokens, histogram

TOOL = "tools/inspect_dataset.py"


def test_facts_and_histogram(tiny_dataset: Path, run_tool):
    outcome = run_tool(TOOL, tiny_dataset, env={"COLUMNS": "150"})
    assert outcome.returncode == 0, outcome.stderr
    source = IndexedTokens(tiny_dataset)
    for part in (f"{source.n_documents:,}", f"{source.n_tokens:,} of uint16", "fingerprint: ", "1 file, ",
                 f"longest {source.sequence_lengths.max():,}"):
        assert part in outcome.stdout


def test_documents_are_decoded(tiny_dataset: Path, tiny_tokenizer: Path, run_tool):
    texts = list(pydoc_data.topics.topics.values())
    outcome = run_tool(TOOL, f"{tiny_dataset}.idx", "--doc", "2", "-1", "--tokenizer-model", tiny_tokenizer)
    assert outcome.returncode == 0, outcome.stderr
    for number, text in ((2, texts[2]), (-1, texts[-1])):
        assert f"--- document {number}: " in outcome.stdout and text.strip() in outcome.stdout
    assert outcome.stdout.count("and the end of the document") == 2


def test_bins_are_powers_of_two():
    lengths = np.array([0, 1, 1, 2, 3, 4, 16, 31])
    assert histogram(lengths) == [Bin(0, 0, 1, 0), Bin(1, 1, 2, 2), Bin(2, 3, 2, 5), Bin(4, 7, 1, 4),
                                  Bin(8, 15, 0, 0), Bin(16, 31, 2, 47)]
    assert histogram(np.zeros(0, np.int64)) == []
    assert histogram(np.array([1 << 40])) == [Bin(1 << 40, (1 << 41) - 1, 1, 1 << 40)]


def test_documents_of_no_and_of_several_sequences(tmp_path: Path):
    with IndexedWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]), [2, 1])
        writer.add_document(np.array([]), [])
        writer.add_document(np.array([4]), [1])
    source = IndexedTokens(tmp_path / "set")
    assert document_lengths(source).tolist() == [3, 0, 1]
    assert [document_tokens(source, number).tolist() for number in (0, 1, 2, -3)] == [[1, 2, 3], [], [4], [1, 2, 3]]


@pytest.mark.parametrize("flags, sentence", [
    (("--doc", "10000"), "--doc 10000: "), (("--doc", "-10000"), "--doc -10000: "),
    (("--doc", "x"), "--doc: invalid int value"),
    (("--doc", "0", "--tokenizer-model", "neo/tokenizer.model"), "is not what "),
    (("--docs", "1"), "unknown flag --docs; the nearest known one is --doc")])
def test_a_mistake_is_a_sentence(flags: tuple[str, ...], sentence: str, tiny_dataset: Path, tiny_tokenizer: Path,
                                 run_tool):
    outcome = run_tool(TOOL, tiny_dataset, "--tokenizer-model", tiny_tokenizer, *flags)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and sentence in outcome.stderr and outcome.stderr.count("\n") == 1
