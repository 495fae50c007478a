"""Processes that share a stream of tasks and give the results back in the order of the tasks.

`multiprocessing.Pool` waits for ever for a worker that was killed, and `concurrent.futures` keeps the
program alive until running tasks are done. Here a dead worker is noticed where its result is due, and
leaving the block ends the workers at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from megatron.pretrain.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
TASKS_AHEAD = 2
"""Tasks a worker may hold: one it works on, one that waits so that it never has to."""

_NO_MORE = object()


class WorkerGone(UserError):
    """A worker was killed, or ended by itself, before its work was done."""


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class OrderedWorkers(Generic[Task, Result]):
    """`count` processes that run `handle`, which must be picklable where processes are spawned."""

    def __init__(self, count: int, handle: Callable[[Task], Result]) -> None:
        self._workers = [_start(handle) for _ in range(count)]

    def __enter__(self) -> OrderedWorkers[Task, Result]:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task and its `handle(task)`, in order, with a bounded number of tasks ahead.

        An exception of `handle` is raised here, the first in the order of the tasks; a worker that is
        gone raises UserError.
        """
        due: deque[tuple[Task, _Worker]] = deque()
        for number, task in enumerate(tasks):
            if len(due) == TASKS_AHEAD * len(self._workers):
                yield _next(due)
            worker = self._workers[number % len(self._workers)]
            _send(worker, task)
            due.append((task, worker))
        while due:
            yield _next(due)


def _start(handle: Callable[[Any], Any]) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(handle, theirs, ours), daemon=True)
    process.start()
    # With our copy closed the worker's end is the last, so that its death reads as an end of file.
    theirs.close()
    return _Worker(process, ours)


def _serve(handle: Callable[[Any], Any], pipe: Connection, parents_end: Connection) -> None:
    """The worker: answer tasks until the parent is gone."""
    _die_with(os.getppid())
    # A fork copies the parent's end too; while it is open here, the parent's death would go unnoticed.
    parents_end.close()
    # Ctrl-C reaches the whole group, but ending the workers is the parent's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(pipe, tasks), daemon=True).start()
    while True:
        task = tasks.get()
        if task is _NO_MORE:
            return
        try:
            answer = handle(task), None
        except Exception as error:
            answer = error, traceback.format_exc()
        try:
            _send_answer(pipe, answer)
        except OSError:
            return


def _send_answer(pipe: Connection, answer: Any) -> None:
    """Arrays go as they lie in memory, after the rest; a pickle that held them would be two more copies."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    pipe.send((rest, [array.nbytes for array in arrays]))
    for array in arrays:
        while array.nbytes:
            array = array[os.write(pipe.fileno(), array):]


def _receive_answer(pipe: Connection) -> Any:
    rest, sizes_bytes = pipe.recv()
    arrays = [bytearray(size_bytes) for size_bytes in sizes_bytes]
    for array in arrays:
        left = memoryview(array)
        while left.nbytes:
            read_bytes = os.readv(pipe.fileno(), [left])
            if not read_bytes:
                raise EOFError
            left = left[read_bytes:]
    return pickle.loads(rest, buffers=arrays)


def _receive_tasks(pipe: Connection, tasks: SimpleQueue[Any]) -> None:
    """Take tasks in while an answer is being sent.

    Neither fits into a pipe: a parent that sends a task to a worker that sends an answer would wait for
    ever if the worker did not listen.
    """
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            tasks.put(_NO_MORE)
            return


def _die_with(parent: int) -> None:
    """On Linux, end with the parent even in the middle of a task; elsewhere a worker ends after it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _send(worker: _Worker, task: Any) -> None:
    try:
        worker.pipe.send(task)
    except OSError:
        raise _gone(worker) from None


def _next(due: deque[tuple[Any, _Worker]]) -> tuple[Any, Any]:
    task, worker = due.popleft()
    return task, _receive(worker)


def _receive(worker: _Worker) -> Any:
    try:
        result, trace = _receive_answer(worker.pipe)
    except (EOFError, OSError):
        raise _gone(worker) from None
    if trace is not None:
        raise result from RuntimeError(f"in worker {worker.process.pid}:\n{trace}")
    return result


def _gone(worker: _Worker) -> WorkerGone:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "; if memory ran out, give fewer --workers" if code == -signal.SIGKILL else ""
    return WorkerGone(f"worker process {worker.process.pid} {how} before its work was done{hint}")
