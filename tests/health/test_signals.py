"""A run that is asked to stop saves where it stands and leaves in order; run as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.pretrain.checkpoint.manifest import find_checkpoint, read_manifest

ENDLESS = ("--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --seq-length 32 "
           "--micro-batch-size 2 --train-iters 1000000 --lr 1e-3 --log-interval 1").split()


@pytest.fixture
def start(repository: Path, tiny_dataset: Path, tiny_tokenizer: Path, tmp_path: Path):
    """`start(*flags)` starts a run that would take for ever, in tmp_path; it is ended with the test."""
    running = []

    def run(*flags: str) -> subprocess.Popen:
        command = [sys.executable, repository / "pretrain_gpt.py", *ENDLESS, "--data-path", tiny_dataset,
                   "--tokenizer-model", tiny_tokenizer, "--save", tmp_path / "checkpoint", *flags]
        with open(tmp_path / "output", "w", encoding="utf-8") as output:
            running.append(subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def iterations(folder: Path) -> list[int]:
    """The iterations that metrics.jsonl tells of."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record["iteration"] for record in map(json.loads, lines) if "lm_loss" in record]


def wait_for_iterations(folder: Path, process: subprocess.Popen, count: int) -> None:
    deadline_s = time.monotonic() + 120
    while len(iterations(folder)) < count:
        assert process.poll() is None and time.monotonic() < deadline_s, (folder / "output").read_text()
        time.sleep(0.05)


def check_left_in_order(folder: Path, reason: str) -> None:
    """The last checkpoint is that of the last iteration, and the log says why it was the last."""
    manifest = read_manifest(find_checkpoint(str(folder / "checkpoint")))
    assert iterations(folder) == list(range(1, manifest.iteration + 1))
    said = (folder / "output").read_text()
    assert f"leaving at iteration {manifest.iteration} of 1000000 ({reason})" in said
    assert "Traceback" not in said


def test_sigterm_saves_and_leaves_with_success(start, tmp_path: Path):
    process = start()
    wait_for_iterations(tmp_path, process, 2)
    process.terminate()
    assert process.wait(timeout=60) == 0, (tmp_path / "output").read_text()
    check_left_in_order(tmp_path, "SIGTERM")


def test_time_limit_saves_and_leaves_with_success(start, tmp_path: Path):
    process = start("--exit-duration-in-mins", "0.01")
    assert process.wait(timeout=120) == 0, (tmp_path / "output").read_text()
    check_left_in_order(tmp_path, "--exit-duration-in-mins")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_second_signal_ends_the_process_at_once(run_tool, name: str):
    """Whoever insists does not wait for a checkpoint."""
    said = run_tool("-c", f"""
import os, signal
from megatron.pretrain.health.signals import StopRequests
# As a process at a terminal has it: Python would make an exception of it.
signal.signal(signal.SIGINT, signal.SIG_DFL)
with StopRequests(None) as stop:
    assert stop.reason is None
    os.kill(os.getpid(), signal.{name})
    print(stop.reason, flush=True)
    os.kill(os.getpid(), signal.{name})
    print("still here", flush=True)
""")
    assert said.stdout == f"{name}\n"
    assert said.returncode == -getattr(signal, name)


def test_handlers_of_before_are_back_after_the_run():
    from megatron.pretrain.health.signals import StopRequests

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequests(1.0) as stop:
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert stop.reason is None, "a minute is not over yet"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
