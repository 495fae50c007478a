"""What every test may ask for: a small tokenizer of NEO's kind, and a way to run our entry points."""

from __future__ import annotations

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model of 1,000 pieces with NEO's settings, learnt from Python's own manual."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "topics.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tiny"), vocab_size=1000, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.9999, minloglevel=2)
    return folder / "tiny.model"


@pytest.fixture(scope="session")
def run_tool():
    """`run_tool("tools/x.py", "--flag", cwd=..., env={...})` runs this Python on it and returns what it said."""

    def run(*arguments: str | Path, cwd: Path = REPOSITORY, env: dict[str, str] | None = None,
            timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(str(argument) for argument in arguments)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, text=True,
                              capture_output=True, timeout=timeout_s)

    return run
