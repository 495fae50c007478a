"""Stopping in order: a signal or a time limit ends the run after a checkpoint, on all ranks alike."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist


class StopRequests:
    """Remembers SIGTERM and SIGINT, and when the run's time is over; a context manager.

    A second signal ends the process at once, as it would have without this.
    """

    def __init__(self, limit_minutes: float | None) -> None:
        self._deadline_s = math.inf if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self._signal: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def reason(self) -> str | None:
        """What asked this rank to stop; None if nothing did."""
        if self._signal is None and time.monotonic() >= self._deadline_s:
            return "--exit-duration-in-mins"
        return self._signal

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective call: every rank must make it."""
        flag = torch.tensor(float(self.reason is not None), device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
