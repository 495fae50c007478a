"""The whole quickstart, with a model and a corpus so small that it cannot beat the bigram model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "neo" / "scripts" / "quickstart.sh"
SMALL = {"CORPUS_MEGABYTES": "0.05", "VOCAB_SIZE": "500", "DOCS_ROUNDS": "0.05", "NUM_LAYERS": "1",
         "HIDDEN_SIZE": "32", "FFN_HIDDEN_SIZE": "64", "NUM_HEADS": "2", "NUM_KV_HEADS": "1",
         "SEQ_LEN": "128", "GLOBAL_BATCH_SIZE": "32", "PHASE_2_ITERS": "4"}
STEPS = ["environment", "corpus", "tokenizer", "preprocess", "count", "mix", "pretrain", "resume", "decay",
         "convert", "talk"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "home"


def quickstart(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Set for another run, which must not become this one's.
    stale = {"DATA_PATH": "another-run", "TRAIN_ITERS": "7", "TP_SIZE": "4", "NODE_RANK": "3",
             "MASTER_ADDR": "another-node"}
    environment = {**os.environ, **SMALL, **stale, "QUICKSTART_HOME": str(home), "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(["bash", str(QUICKSTART), *arguments], env=environment, text=True,
                          capture_output=True)


@pytest.fixture(scope="module")
def outcome(home: Path) -> subprocess.CompletedProcess[str]:
    return quickstart(home)


def test_every_step_runs_and_the_last_refuses_a_model_that_has_learnt_too_little(outcome, home: Path):
    steps = [path.read_text().split("\t")[0] for path in sorted((home / "steps").iterdir())]
    assert steps == STEPS, outcome.stdout + outcome.stderr
    assert outcome.returncode == 2
    assert f"error: the step 'measure' failed; its output is in {home}/logs/11_measure.log" in outcome.stderr
    figures = json.loads((home / "heldout.json").read_text())
    assert figures["bigram"] < figures["model"]


def test_the_run_stopped_halfway_and_resumed_there(outcome, home: Path):
    saved = sorted(path.name for path in (home / "pretrain" / "checkpoint").glob("iter_*"))
    assert len(saved) == 2
    halfway, last = (int(name.removeprefix("iter_")) for name in saved)
    assert halfway == last // 2
    assert f"TRAIN_ITERS={last}\n" in (home / "mixture.env").read_text()
    resumed = (home / "logs" / "07_resume.log").read_text()
    assert "starts from its own checkpoint" in resumed


def test_the_converted_model_said_what_the_training_model_said(outcome):
    assert "64 greedy fp32 tokens equal the training model's own" in outcome.stdout


def test_keep_does_only_what_is_missing(outcome, home: Path):
    again = quickstart(home, "--keep")
    assert again.stdout.count(": kept\n") == len(STEPS) - 1
    assert "measure ..." in again.stdout
