"""The log line, read back the way Megatron-LM's users read it."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime

from megatron.pretrain.log.metrics import IntervalRecord, megatron_line

RECORD = IntervalRecord(
    iteration=100, train_iters=6000, consumed_samples=102_400, consumed_tokens=838_860_800,
    elapsed_ms_per_iteration=512.345, tokens_per_second=16_373_364.4, tflops_per_gpu=407.654, mfu=0.41198,
    learning_rate=2e-4, global_batch_size=1024, lm_loss=1.234567, grad_norm=0.12345, skipped_iterations=2,
    nan_iterations=1, data_wait_ms=0.5, memory_bytes=60 * 2**30,
    time_s=datetime(2026, 11, 23, 12, 0, 0).timestamp())


def test_the_line_is_megatrons():
    assert megatron_line(RECORD) == (
        " [2026-11-23 12:00:00] iteration      100/    6000 | consumed samples:       102400 | "
        "consumed tokens:       838860800 | elapsed time per iteration (ms): 512.3 | "
        "tokens per second: 16373364.4 | throughput per GPU (TFLOP/s/GPU): 407.7 | MFU: 41.2% | "
        "learning rate: 2.000000E-04 | global batch size:  1024 | lm loss: 1.234567E+00 | loss scale: 1.0 | "
        "grad norm: 0.123 | number of skipped iterations:   2 | number of nan iterations:   1 |")


def test_what_parsers_of_megatron_logs_look_for_is_found():
    line = megatron_line(RECORD)
    found = {
        "iteration": re.search(r"iteration\s+(\d+)\s*/\s*(\d+) \|", line)[1],
        "lm loss": re.search(r"lm loss:\s+(\S+) \|", line)[1],
        "ms": re.search(r"elapsed time per iteration \(ms\):\s+([\d.]+) \|", line)[1],
        "samples": re.search(r"consumed samples:\s+(\d+) \|", line)[1],
        "rate": re.search(r"learning rate:\s+(\S+) \|", line)[1],
        "batch": re.search(r"global batch size:\s+(\d+) \|", line)[1],
        "norm": re.search(r"grad norm:\s+(\S+) \|", line)[1],
        "skipped": re.search(r"number of skipped iterations:\s+(\d+) \|", line)[1],
        "nan": re.search(r"number of nan iterations:\s+(\d+) \|", line)[1],
        "throughput": re.search(r"throughput per GPU \(TFLOP/s/GPU\):\s+([\d.]+) \|", line)[1],
    }
    assert {name: float(text) for name, text in found.items()} == {
        "iteration": 100, "lm loss": 1.234567, "ms": 512.3, "samples": 102_400, "rate": 2e-4, "batch": 1024,
        "norm": 0.123, "skipped": 2, "nan": 1, "throughput": 407.7}


def test_what_is_unknown_is_left_out():
    line = megatron_line(dataclasses.replace(
        RECORD, tflops_per_gpu=None, mfu=None, lm_loss=None, grad_norm=None, memory_bytes=None))
    assert "None" not in line
    for absent in ("TFLOP", "MFU", "lm loss", "grad norm"):
        assert absent not in line
    assert line.count("|") == megatron_line(RECORD).count("|") - 4
