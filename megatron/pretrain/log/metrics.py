"""The figures of one log interval, and the line they make in Megatron-LM's shape."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, kw_only=True)
class IntervalRecord:
    """What happened between two log lines; a mean is over the interval's iterations."""

    iteration: int
    """The last iteration of the interval, counted from 1."""
    train_iters: int
    consumed_samples: int
    consumed_tokens: int
    elapsed_ms_per_iteration: float
    tokens_per_second: float
    """Of the whole run, over all devices."""
    tflops_per_gpu: float | None
    """Model TFLOP/s a device; None where it is not counted."""
    mfu: float | None
    """Fraction of the device's dense peak; None where the peak is unknown."""
    learning_rate: float
    global_batch_size: int
    lm_loss: float | None
    """Mean over the iterations whose loss was finite; None where there was none."""
    loss_scale: float = 1.0
    grad_norm: float | None
    """Before clipping, of the last iteration."""
    skipped_iterations: int
    """Iterations of the interval whose update was skipped."""
    nan_iterations: int
    """Iterations of the interval whose loss was not finite."""
    data_wait_ms: float
    """Time that an iteration waited for its batches."""
    memory_bytes: int | None
    """Most device memory that tensors held; None on a CPU."""
    time_s: float = field(default_factory=time.time)
    """When the interval ended, in seconds since 1970."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def megatron_line(record: IntervalRecord) -> str:
    """The record as one line that parsers of Megatron-LM's logs read; what is None is left out."""
    pieces = [
        f"iteration {record.iteration:8d}/{record.train_iters:8d}",
        f"consumed samples: {record.consumed_samples:12d}",
        f"consumed tokens: {record.consumed_tokens:15d}",
        f"elapsed time per iteration (ms): {record.elapsed_ms_per_iteration:.1f}",
        f"tokens per second: {record.tokens_per_second:.1f}",
    ]
    if record.tflops_per_gpu is not None:
        pieces.append(f"throughput per GPU (TFLOP/s/GPU): {record.tflops_per_gpu:.1f}")
    if record.mfu is not None:
        pieces.append(f"MFU: {record.mfu:.1%}")
    pieces.append(f"learning rate: {record.learning_rate:.6E}")
    pieces.append(f"global batch size: {record.global_batch_size:5d}")
    if record.lm_loss is not None:
        pieces.append(f"lm loss: {record.lm_loss:.6E}")
    pieces.append(f"loss scale: {record.loss_scale:.1f}")
    if record.grad_norm is not None:
        pieces.append(f"grad norm: {record.grad_norm:.3f}")
    pieces.append(f"number of skipped iterations: {record.skipped_iterations:3d}")
    pieces.append(f"number of nan iterations: {record.nan_iterations:3d}")
    return f" [{clock(record.time_s)}] " + " | ".join(pieces) + " |"


def clock(time_s: float) -> str:
    """Seconds since 1970 as local date and time, as a log line begins."""
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M:%S")
