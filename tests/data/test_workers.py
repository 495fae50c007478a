"""Results come in the order of the tasks, and a worker that is gone is a sentence, not a wait for ever."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from megatron.pretrain.data.workers import OrderedWorkers
from megatron.pretrain.errors import UserError


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


def sleep_for_ever(_: int) -> None:
    time.sleep(1000)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_keep_the_order_of_the_tasks(count: int):
    with OrderedWorkers(count, slow_square) as workers:
        assert list(workers.map(range(40))) == [(number, number * number) for number in range(40)]


def test_tasks_and_results_may_be_larger_than_a_pipe():
    tasks = [bytes([number]) * 3_000_000 for number in range(12)]
    with OrderedWorkers(2, bytes.upper) as workers:
        assert [result for _, result in workers.map(tasks)] == [task.upper() for task in tasks]


def test_tasks_are_drawn_only_a_little_ahead():
    drawn = []
    with OrderedWorkers(2, slow_square) as workers:
        results = workers.map(drawn.append(number) or number for number in range(100))
        next(results)
        assert len(drawn) <= 5


def test_the_first_exception_in_order_is_raised_with_its_trace():
    with OrderedWorkers(3, fail_from_five_on) as workers:
        results = workers.map(range(20))
        assert [next(results)[1] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(KeyError, match="5") as raised:
            next(results)
    assert "in fail_from_five_on" in str(raised.value.__cause__)


@pytest.mark.parametrize("handle, how", [(die_at_three, "was killed by SIGKILL .* fewer --workers"),
                                         (leave_at_three, "ended with exit code 7")])
def test_a_worker_that_is_gone_ends_the_work(handle, how: str):
    with pytest.raises(UserError, match=how), OrderedWorkers(2, handle) as workers:
        list(workers.map(range(1000)))


def test_leaving_the_block_ends_busy_workers_at_once():
    started = time.monotonic()
    others = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), OrderedWorkers(2, sleep_for_ever) as workers:
        results = workers.map(range(4))
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        next(results)
    assert time.monotonic() - started < 5
    assert not [child for child in set(psutil.Process().children()) - others
                if child.status() != psutil.STATUS_ZOMBIE]
