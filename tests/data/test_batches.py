"""Micro-batches: dealt out as Megatron-LM deals them, resumed by one number, and never a thread left."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron.pretrain.data.batches import BatchSchedule, Loader, MicroBatch
from megatron.pretrain.errors import UserError

SEQ_LENGTH = 4


class Numbers:
    """Sample i is i, i + 1, ..., i + S; slow or failing on demand."""

    def __init__(self, *, delay_s: float = 0.0, fails_at: int | None = None) -> None:
        self.delay_s = delay_s
        self.fails_at = fails_at
        self.threads: set[str] = set()

    def samples(self, indices):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay_s)
        if self.fails_at in indices:
            raise UserError(f"sample {self.fails_at} is broken")
        tokens = indices[:, None] + np.arange(SEQ_LENGTH + 1)
        return tokens, np.ones((len(indices), SEQ_LENGTH), dtype=np.float32)


def _first_tokens(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in batches]


def _loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_micro_batches_are_dealt_over_ranks_as_megatron_deals_them():
    """Megatron-LM's MegatronPretrainingSampler: fill micro-batch x ranks rows, give each rank its slice."""
    micro, ranks, whole, consumed = 2, 3, 12, 24
    rows = np.arange(consumed, consumed + whole).reshape(-1, ranks, micro)
    for rank in range(ranks):
        schedule = BatchSchedule(whole, micro, ranks, rank)
        ours = [schedule.rows(consumed, number) for number in range(schedule.micro_batches)]
        assert np.array_equal(ours, rows[:, rank])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch 10 is no multiple of micro-batch 2 x data-parallel size 3"):
        BatchSchedule(10, 2, 3, 0)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_and_end_before_the_stop(num_workers):
    with Loader(Numbers(), BatchSchedule(6, 3), stop_samples=17, num_workers=num_workers) as loader:
        batches = list(loader)
    assert _first_tokens(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert batches[1].tokens.tolist() == [[3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8]]
    assert batches[1].labels.tolist() == [[4, 5, 6, 7], [5, 6, 7, 8], [6, 7, 8, 9]]
    assert batches[1].tokens.flags.c_contiguous and batches[1].labels.flags.c_contiguous


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_goes_on_where_it_was(num_workers):
    schedule = BatchSchedule(4, 2)
    with Loader(Numbers(), schedule, stop_samples=40, num_workers=num_workers) as straight:
        expected = _first_tokens(list(straight))
    with Loader(Numbers(), schedule, num_workers=num_workers) as first:
        seen = [next(first) for _ in range(10)]
    with Loader(Numbers(), schedule, consumed_samples=20, stop_samples=40, num_workers=num_workers) as second:
        assert _first_tokens([*seen, *second]) == expected


def test_threads_read_ahead_and_no_thread_reads_inline():
    read_ahead, inline = Numbers(), Numbers()
    with Loader(read_ahead, BatchSchedule(2, 2), num_workers=2) as loader:
        next(loader)
    with Loader(inline, BatchSchedule(2, 2), num_workers=0) as loader:
        next(loader)
    assert all(name.startswith("batches") for name in read_ahead.threads)
    assert inline.threads == {threading.current_thread().name}


def test_an_error_in_a_thread_reaches_whoever_asked_for_that_batch():
    with Loader(Numbers(fails_at=5), BatchSchedule(2, 2), num_workers=2) as loader:
        assert _first_tokens([next(loader), next(loader)]) == [[0, 1], [2, 3]]
        with pytest.raises(UserError, match="sample 5 is broken"):
            next(loader)


def test_closing_leaves_no_thread_even_after_an_error_and_drops_what_waits():
    slow = Numbers(delay_s=0.15)  # what is read ahead would take 32 x 0.15 s on two threads
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match="the step failed"), Loader(slow, BatchSchedule(1, 1)) as loader:
        next(loader)
        raise RuntimeError("the step failed")
    assert time.perf_counter() - begin < 1.5
    assert not _loader_threads()
    assert list(loader) == []


def test_the_wait_for_data_is_measured():
    with Loader(Numbers(delay_s=0.02), BatchSchedule(1, 1), num_workers=0) as loader:
        next(loader)
        next(loader)
        assert 40 <= loader.take_wait_ms() < 2000
        assert loader.take_wait_ms() == 0.0
    with Loader(Numbers(delay_s=0.1), BatchSchedule(1, 1), num_workers=1) as loader:
        next(loader)
        time.sleep(0.4)
        loader.take_wait_ms()
        next(loader)
        assert loader.take_wait_ms() < 80
