"""Results come in the order of the tasks, and a worker that is gone is a sentence, not a wait for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.pretrain.data.workers import OrderedWorkers, WorkerGone


class Answers:
    """Work whose report is `handle(task)`; each result goes to a file of its place's name."""

    def __init__(self, handle: Callable[[Any], Any], folder: Path | None = None) -> None:
        self.handle, self.folder = handle, folder
        self.held: list[Any] = []

    def begin(self, task: Any) -> Any:
        self.held.append(self.handle(task))
        return self.held[-1]

    def finish(self, place: Any) -> None:
        result = self.held.pop(0)
        if self.folder:
            (self.folder / str(place)).write_text(str(result))


def slow_square(number: int) -> int:
    time.sleep(0.01 if number % 3 == 0 else 0)
    return number * number


def fail_from_five_on(number: int) -> int:
    if number >= 5:
        raise KeyError(number)
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_at_three(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number


def want_memory_at_three(number: int) -> int:
    if number == 3:
        raise MemoryError
    return number


class CannotBeReceived:
    """A task for which the worker has no memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return want_memory_at_three, (3,)


def sleep_for_ever(_: int) -> None:
    time.sleep(1000)


def report_of(_: Any, report: Any) -> Any:
    """A place that says what was reported."""
    return report


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tasks_and_reports_come_in_order_and_results_go_where_they_are_told(count: int, tmp_path: Path):
    reports = []
    with OrderedWorkers(count, Answers(slow_square, tmp_path)) as workers:
        done = workers.run(range(40), lambda task, report: reports.append((task, report)) or len(reports))
        for number, task in enumerate(done):
            assert task == number
            assert (tmp_path / str(number + 1)).read_text() == str(number * number)
    assert reports == [(number, number * number) for number in range(40)]


def test_tasks_and_reports_may_be_larger_than_a_pipe():
    tasks = [bytes([number]) * 3_000_000 for number in range(12)]
    reports = []
    with OrderedWorkers(2, Answers(bytes.upper)) as workers:
        assert list(workers.run(tasks, lambda _, report: reports.append(report))) == tasks
    assert reports == [task.upper() for task in tasks]


def test_tasks_are_drawn_only_a_little_ahead():
    drawn = []
    with OrderedWorkers(2, Answers(slow_square)) as workers:
        done = workers.run((drawn.append(number) or number for number in range(100)), report_of)
        for task in done:
            assert len(drawn) - task <= 9  # four begun, four more that are written


def test_the_first_exception_in_order_is_raised_with_its_trace():
    reports = []
    with OrderedWorkers(3, Answers(fail_from_five_on)) as workers:
        with pytest.raises(KeyError, match="5") as raised:
            list(workers.run(range(20), lambda _, report: reports.append(report)))
    assert reports == [0, 1, 2, 3, 4]
    assert "in fail_from_five_on" in str(raised.value.__cause__)


def test_a_result_that_cannot_be_delivered_ends_the_work(tmp_path: Path):
    work = Answers(slow_square, tmp_path / "none")
    with pytest.raises(FileNotFoundError), OrderedWorkers(2, work) as workers:
        list(workers.run(range(3), report_of))


@pytest.mark.parametrize("handle, how", [(die_at_three, "was killed by SIGKILL .* fewer --workers"),
                                         (leave_at_three, "ended with exit code 7"),
                                         (want_memory_at_three, "ran out of memory; give fewer --workers")])
def test_a_worker_that_is_gone_ends_the_work(handle, how: str):
    with pytest.raises(WorkerGone, match=how), OrderedWorkers(2, Answers(handle)) as workers:
        list(workers.run(range(1000), report_of))


def test_a_worker_that_cannot_take_its_task_in_ends_the_work(capfd: pytest.CaptureFixture[str]):
    with (pytest.raises(WorkerGone, match="ended with exit code 1 before its work was done"),
          OrderedWorkers(1, Answers(slow_square)) as workers):
        list(workers.run([1, CannotBeReceived(), 2], report_of))
    assert "MemoryError" in capfd.readouterr().err


def test_leaving_the_block_ends_busy_workers_at_once():
    started = time.monotonic()
    others = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), OrderedWorkers(2, Answers(sleep_for_ever)) as workers:
        done = workers.run(range(4), report_of)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        next(done)
    assert time.monotonic() - started < 5
    assert not [child for child in set(psutil.Process().children()) - others
                if child.status() != psutil.STATUS_ZOMBIE]
