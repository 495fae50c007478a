"""What every test may ask for: a small tokenizer of NEO's kind, and a way to run our entry points."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
from dataclasses import dataclass
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


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, run_tool) -> Path:
    """A dataset prefix: Python's manual, a document a topic, preprocessed with the tiny tokenizer."""
    import orjson

    folder = tmp_path_factory.mktemp("dataset")
    with open(folder / "topics.jsonl", "wb") as lines:
        for text in pydoc_data.topics.topics.values():
            lines.write(orjson.dumps({"text": text}) + b"\n")
    said = run_tool("tools/preprocess_data.py", "--input", folder / "topics.jsonl", "--output-prefix",
                    folder / "topics", "--tokenizer-model", tiny_tokenizer, "--append-eod")
    assert said.returncode == 0, said.stderr
    return folder / "topics_text_document"


@dataclass(frozen=True)
class Training:
    """A finished `torchrun pretrain_gpt.py`: what it printed, and the folder it wrote to."""

    returncode: int
    output: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def metrics(self) -> list[dict]:
        """The records of metrics.jsonl that are iterations."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "lm_loss" in record]

    def losses(self) -> list[float]:
        return [record["lm_loss"] for record in self.metrics()]


SMALL_MODEL = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 8 --eod-mask-loss --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 2 --weight-decay 0.1 "
    "--clip-grad 1.0 --log-interval 1 --num-workers 1 --override-opt_param-scheduler").split()


@pytest.fixture(scope="session")
def train(tiny_dataset: Path, tiny_tokenizer: Path):
    """`train(folder, *flags, processes=2)` pre-trains a small model on the tiny dataset with real processes."""

    def run(folder: Path, *flags: str | Path, processes: int = 1, expect_failure: bool = False) -> Training:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   str(processes), "pretrain_gpt.py", *SMALL_MODEL, "--data-path", str(tiny_dataset),
                   "--tokenizer-model", str(tiny_tokenizer), "--save", str(folder / "checkpoint"),
                   *(str(flag) for flag in flags)]
        ran = subprocess.run(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert expect_failure or ran.returncode == 0, ran.stdout[-6000:]
        return Training(ran.returncode, ran.stdout, folder)

    return run
