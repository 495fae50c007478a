"""How far a long pass over files is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """A context manager on standard error; `advance(n)` after every `n` of `total_bytes` (0: unknown)."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total_bytes = label, total_bytes
        self._done_bytes = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ByteProgress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.TaskProgressColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True))
            self._task = self._bar.add_task(self._label, total=self._total_bytes or None)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._bar:
            self._bar.advance(self._task, size_bytes)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        bytes_per_s = self._done_bytes / (time.monotonic() - self._started)
        if not self._total_bytes:
            return f"{self._label}: {self._done_bytes / 1e6:,.0f} MB, {bytes_per_s / 1e6:.1f} MB/s"
        done = self._done_bytes / self._total_bytes
        left_s = (self._total_bytes - self._done_bytes) / bytes_per_s
        return (f"{self._label}: {done:.0%} of {self._total_bytes / 1e6:,.0f} MB, "
                f"{bytes_per_s / 1e6:.1f} MB/s, {left_s:,.0f} s left")
