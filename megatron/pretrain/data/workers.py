"""Processes that share a stream of tasks, and deliver each result where those before it end.

`multiprocessing.Pool` waits for ever for a worker that was killed, and `concurrent.futures` keeps the
program alive until running tasks are done. Here a dead worker is noticed where its result is due, and
leaving the block ends the workers at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from megatron.pretrain.errors import Interruption

Task = TypeVar("Task")
Report = TypeVar("Report")
Place = TypeVar("Place")

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
TASKS_AHEAD = 2
"""Tasks a worker may hold: one it works on, one that waits so that it never has to."""

_BEGIN, _FINISH = range(2)


class WorkerGone(Interruption):
    """A worker was killed, or ended by itself or for want of memory, before its work was done."""


class Work(Protocol[Task, Report, Place]):
    """What each worker does, in two steps, because where a result goes depends on those before it."""

    def begin(self, task: Task) -> Report:
        """Do the task and hold its result; the parent gets the report."""

    def finish(self, place: Place) -> None:
        """Deliver the oldest result that is held."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    finished: int = 0
    """Results that it said it delivered, and that were not counted yet."""


class OrderedWorkers(Generic[Task, Report, Place]):
    """`count` processes that do `work`, which must be picklable where processes are spawned."""

    def __init__(self, count: int, work: Work[Task, Report, Place]) -> None:
        self._workers = [_start(work) for _ in range(count)]
        self._begun: deque[tuple[Task, _Worker]] = deque()
        self._placed: deque[tuple[Task, _Worker]] = deque()

    def __enter__(self) -> OrderedWorkers[Task, Report, Place]:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def run(self, tasks: Iterable[Task], place: Callable[[Task, Report], Place]) -> Iterator[Task]:
        """Each task once its result is delivered, in order, with a bounded number of tasks ahead.

        `place` says where a result goes; it sees the reports in the order of the tasks. An exception in a
        worker is raised here, the first in that order; a worker that is gone raises UserError.
        """
        for number, task in enumerate(tasks):
            if len(self._begun) == TASKS_AHEAD * len(self._workers):
                self._place_next(place)
            worker = self._workers[number % len(self._workers)]
            _send(worker, _BEGIN, task)
            self._begun.append((task, worker))
            yield from self._finished()
        while self._begun:
            self._place_next(place)
            yield from self._finished()
        while self._placed:
            _receive(self._placed[0][1], _FINISH)
            yield from self._finished()

    def _place_next(self, place: Callable[[Task, Report], Place]) -> None:
        task, worker = self._begun.popleft()
        _send(worker, _FINISH, place(task, _receive(worker, _BEGIN)))
        self._placed.append((task, worker))

    def _finished(self) -> Iterator[Task]:
        while self._placed and self._placed[0][1].finished:
            task, worker = self._placed.popleft()
            worker.finished -= 1
            yield task


def _start(work: Work[Any, Any, Any]) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(work, theirs, ours), daemon=True)
    process.start()
    # With our copy closed the worker's end is the last, so that its death reads as an end of file.
    theirs.close()
    return _Worker(process, ours)


def _serve(work: Work[Any, Any, Any], pipe: Connection, parents_end: Connection) -> None:
    """The worker: do what the parent asks for until it is gone."""
    _die_with(os.getppid())
    # A fork copies the parent's end too; while it is open here, the parent's death would go unnoticed.
    parents_end.close()
    # Ctrl-C reaches the whole group, but ending the workers is the parent's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    messages: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, messages), daemon=True).start()
    while (message := messages.get()) is not None:
        step, content = message
        try:
            answer = step, work.begin(content) if step == _BEGIN else work.finish(content), None
        except MemoryError:
            gone = WorkerGone(f"worker process {os.getpid()} ran out of memory; give fewer --workers")
            answer = step, gone, traceback.format_exc()
        except Exception as error:
            answer = step, error, traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:
            return


def _listen(pipe: Connection, messages: SimpleQueue[tuple[int, Any] | None]) -> None:
    """Take messages in while an answer is being sent.

    Neither need fit into a pipe: a parent that sends a task to a worker that sends a report would wait for
    ever if the worker did not listen. For the same reason a worker ends that cannot take a message in.
    """
    try:
        while True:
            messages.put(pipe.recv())
    except (EOFError, OSError):
        messages.put(None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _die_with(parent: int) -> None:
    """On Linux, end with the parent even in the middle of a task; elsewhere a worker ends after it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _send(worker: _Worker, step: int, content: Any) -> None:
    try:
        worker.pipe.send((step, content))
    except OSError:
        raise _gone(worker) from None


def _receive(worker: _Worker, awaited: int) -> Any:
    """The worker's next answer of the step that is awaited; deliveries are counted on the way."""
    while True:
        try:
            step, result, trace = worker.pipe.recv()
        except (EOFError, OSError):
            raise _gone(worker) from None
        if trace is not None:
            raise result from RuntimeError(f"in worker {worker.process.pid}:\n{trace}")
        worker.finished += step == _FINISH
        if step == awaited:
            return result


def _gone(worker: _Worker) -> WorkerGone:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "; if memory ran out, give fewer --workers" if code == -signal.SIGKILL else ""
    return WorkerGone(f"worker process {worker.process.pid} {how} before its work was done{hint}")
