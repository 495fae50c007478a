"""Conversions, several at once: a process for each, one display of how far all are."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Task:
    """A conversion that is known to be possible, and the bytes of weights that it will write."""

    source: Path
    target: Path
    options: Options
    verify: bool
    size_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a task: how long it took and what was verified, or why it failed, in a sentence."""

    seconds: float
    verified: str = ""
    failure: str = ""


def convert_all(tasks: Sequence[Task], jobs: int) -> list[Outcome]:
    """Do every task, at most `jobs` at once; one that fails keeps no other from being done."""
    with _Display(tasks) as display:
        if jobs == 1 or len(tasks) == 1:
            return [_attempt(task, partial(display.advance, number)) for number, task in enumerate(tasks)]
        return _in_processes(tasks, min(jobs, len(tasks)), display.advance)


def _in_processes(tasks: Sequence[Task], jobs: int, advance: Callable[[int, int], None]) -> list[Outcome]:
    # A forked process would inherit the display's threads as locks that nobody holds any more.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with context.Manager() as manager:
        messages = manager.Queue()
        listener = threading.Thread(target=_listen, args=(messages, advance))
        listener.start()
        try:
            with ProcessPoolExecutor(jobs, context, _compute_with, (threads,)) as workers:
                return list(workers.map(partial(_attempt_and_tell, messages), range(len(tasks)), tasks))
        except BrokenProcessPool:
            raise UserError("a process that converted was killed, for want of memory perhaps: take less than "
                            f"--jobs {jobs}, and remove the folders named .*.partial-*") from None
        finally:
            messages.put(None)
            listener.join()


def _compute_with(threads: int) -> None:
    """Let torch, where a verification loads it, take so many threads."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _listen(messages: Any, advance: Callable[[int, int], None]) -> None:
    while (message := messages.get()) is not None:
        advance(*message)


def _attempt_and_tell(messages: Any, number: int, task: Task) -> Outcome:
    return _attempt(task, lambda size_bytes: messages.put((number, size_bytes)))


def _attempt(task: Task, on_bytes: Callable[[int], None]) -> Outcome:
    started = time.monotonic()
    try:
        # Planned anew where it is done: a plan is no thing to send to another process.
        verified = run_conversion(plan_conversion(task.source, task.options), task.target, on_bytes,
                                  verify=task.verify)
    except UserError as problem:
        return Outcome(time.monotonic() - started, failure=str(problem))
    return Outcome(time.monotonic() - started, "" if verified is None else str(verified))


class _Display:
    """On standard error: a bar for each task on a terminal, a line for all now and then elsewhere."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._total_bytes, self._done_bytes = sum(task.size_bytes for task in tasks), 0
        self._last_line = time.monotonic()
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
            progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._numbers = [
            self._bars.add_task(f"{task.source.name} -> {task.target.name}", total=task.size_bytes)
            for task in tasks]

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def advance(self, number: int, size_bytes: int) -> None:
        """Task `number` has written `size_bytes` more."""
        self._done_bytes += size_bytes
        self._bars.advance(self._numbers[number], size_bytes)
        if self._bars.disable and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            done = self._done_bytes / self._total_bytes
            print(f"{done:.0%} of {self._total_bytes / 1e6:,.0f} MB converted", file=sys.stderr, flush=True)
