"""From samples to a rank's micro-batches, read ahead by threads. Where it stands is one number."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_MICRO_BATCHES_AHEAD = 32


class Samples(Protocol):
    """What batches are drawn from; see `dataset.PretrainDataset.samples`."""

    def samples(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one data-parallel rank; contiguous arrays of its own."""

    tokens: np.ndarray
    """int64 [micro-batch, seq_length]"""
    labels: np.ndarray
    """int64 [micro-batch, seq_length]: the token to the right of each input."""
    loss_mask: np.ndarray
    """float32 [micro-batch, seq_length]: 0 or 1."""


@dataclass(frozen=True)
class BatchSchedule:
    """Which samples a data-parallel rank reads, as Megatron-LM deals them out.

    The global batch at c consumed samples is samples c .. c + global_batch_size - 1. Its micro-batch m
    on rank d is the micro_batch_size samples from c + (m * data_parallel_size + d) * micro_batch_size.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int = 1
    data_parallel_rank: int = 0

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ValueError(
                f"global batch {self.global_batch_size} is no multiple of micro-batch "
                f"{self.micro_batch_size} x data-parallel size {self.data_parallel_size}")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def rows(self, consumed_samples: int, micro_batch: int) -> np.ndarray:
        """Sample numbers of a micro-batch of the global batch that starts there: int64 [micro_batch_size]."""
        place = micro_batch * self.data_parallel_size + self.data_parallel_rank
        return consumed_samples + place * self.micro_batch_size + np.arange(self.micro_batch_size)


class Loader:
    """Iterates over a rank's micro-batches in order, from any position, reading ahead.

    A context manager: leaving it stops the threads. What a thread raises is raised again by the `next`
    that would have returned its micro-batch. Threads handle numpy arrays alone; tensors are made by
    whoever iterates.

    Args:
        dataset: where samples come from; read by several threads at once.
        schedule: which samples are this rank's.
        consumed_samples: where the first global batch starts; this alone resumes a run.
        stop_samples: the iteration ends before a global batch that would pass this; None never ends.
        num_workers: threads that read ahead; 0 reads in `next` itself.
    """

    def __init__(self, dataset: Samples, schedule: BatchSchedule, *, consumed_samples: int = 0,
                 stop_samples: int | None = None, num_workers: int = 2) -> None:
        self._dataset = dataset
        self._schedule = schedule
        self._rows = self._all_rows(consumed_samples, stop_samples)
        self._pool = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._ahead = max(num_workers, _MICRO_BATCHES_AHEAD)
        self._pending: deque[Future[MicroBatch]] = deque()
        self._wait_s = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        begin = time.perf_counter()
        try:
            return self._read(next(self._rows)) if self._pool is None else self._next_read_ahead()
        finally:
            self._wait_s += time.perf_counter() - begin

    def take_wait_ms(self) -> float:
        """Milliseconds that `next` took, in total, since this was last asked."""
        waited_ms, self._wait_s = self._wait_s * 1000, 0.0
        return waited_ms

    def close(self) -> None:
        """Drop what was read ahead and wait for the threads; the iteration is over."""
        self._rows = iter(())
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _all_rows(self, consumed_samples: int, stop_samples: int | None) -> Iterator[np.ndarray]:
        size = self._schedule.global_batch_size
        while stop_samples is None or consumed_samples + size <= stop_samples:
            for micro_batch in range(self._schedule.micro_batches):
                yield self._schedule.rows(consumed_samples, micro_batch)
            consumed_samples += size

    def _next_read_ahead(self) -> MicroBatch:
        while len(self._pending) < self._ahead and (rows := next(self._rows, None)) is not None:
            self._pending.append(self._pool.submit(self._read, rows))
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def _read(self, rows: np.ndarray) -> MicroBatch:
        tokens, loss_mask = self._dataset.samples(rows)
        return MicroBatch(tokens=np.ascontiguousarray(tokens[:, :-1]),
                          labels=np.ascontiguousarray(tokens[:, 1:]), loss_mask=loss_mask)
