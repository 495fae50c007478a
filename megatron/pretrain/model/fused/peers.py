"""Tensor-parallel collectives through the GPUs' own view of each other's memory, beside products.

NCCL's kernels take multiprocessors away, and a persistent product waits for its last one: beside each other they
take about as long as one after the other. Copy engines take none. Each rank puts its part where the others see
it, all meet at a barrier, and everyone fetches what it needs while its own part is computed.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from megatron.pretrain.errors import UserError

FIRST_HALF_BYTES = 1 << 20
T = TypeVar("T")

logger = logging.getLogger(__name__)


class PeerMemory:
    """Memory of each of a group's ranks that all of them can read, in two halves that collectives use in turn.

    A rank may write a half again when all have read what it held. It has passed the barrier of the collective
    between, and a rank reaches that only after it has waited for its reads of the one before: so no collective
    may be started before the last one was waited for.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group
        self._stream = torch.cuda.Stream()
        self._halves = itertools.cycle((0, 1))
        self._half_bytes = 0

    def meet(self) -> None:
        """Start with the first half again: a recorded sequence of collectives may follow itself, or any other."""
        self._memory.barrier(channel=0)
        self._halves = itertools.cycle((0, 1))

    def gather(self, shard: Tensor, whole: Tensor, consume: Callable[[Tensor, int], None]) -> None:
        """Each rank's shard [s, ...] into whole [ranks * s, ...]; consume(rows, rank) for each, this rank's first."""
        blocks = whole.chunk(self.size)
        half = self._next_half(shard.nbytes)
        self._slot(self.rank, half, shard).copy_(shard)
        self._memory.barrier(channel=0)
        fetched = self._fetch([(self._slot(peer, half, shard), blocks[peer]) for peer in self._others()])
        blocks[self.rank].copy_(shard)
        consume(blocks[self.rank], self.rank)
        for peer, event in zip(self._others(), fetched, strict=True):
            torch.cuda.current_stream().wait_event(event)
            consume(blocks[peer], peer)

    def scatter_sum(self, shard: Tensor, produce: Callable[[int, Tensor], None]) -> Callable[[], None]:
        """Each rank's sum over all ranks' produce(rank, out), into shard [s, ...] once what is returned is called.

        The parts of others are computed first, and travel while this rank's own is.
        """
        half = self._next_half(shard.nbytes * (self.size - 1))
        arrived = shard.new_empty(self.size - 1, *shard.shape)
        fetched = []
        for step, peer in enumerate(self._others()):
            produce(peer, self._slot(self.rank, half, shard, step))
            self._memory.barrier(channel=0)
            source = (self.rank - 1 - step) % self.size  # whose `peer` of this step is this rank
            fetched += self._fetch([(self._slot(source, half, shard, step), arrived[step])])
        produce(self.rank, shard)

        def finish() -> None:
            for part, event in zip(arrived, fetched, strict=True):
                torch.cuda.current_stream().wait_event(event)
                shard.add_(part)

        return finish

    def _others(self) -> list[int]:
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _fetch(self, copies: list[tuple[Tensor, Tensor]]) -> list[torch.cuda.Event]:
        """Copy on a stream of its own what is ready now, and say when each is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        done = []
        with torch.cuda.stream(self._stream):
            for source, target in copies:
                target.copy_(source)
                done.append(self._stream.record_event())
        return done

    def reserve(self, half_bytes: int) -> None:
        """Make room of at least this size a half, on all ranks alike, once nobody reads the former.

        Raises RuntimeError on all ranks where one fails, so that none waits for it.
        """
        torch.cuda.synchronize()
        dist.barrier(self._group)
        self._half_bytes = -(-half_bytes // 512) * 512
        self._tensor = self._all_or_none(lambda: symmetric_memory.empty(
            2 * self._half_bytes, dtype=torch.uint8, device=torch.cuda.current_device()))
        self._memory = self._all_or_none(lambda: symmetric_memory.rendezvous(self._tensor, self._group))

    def _all_or_none(self, make: Callable[[], T]) -> T:
        """What this rank makes, once all ranks have made theirs."""
        made, failure = None, None
        try:
            made = make()
        except RuntimeError as error:
            failure = error
        failed = torch.tensor(int(failure is not None), device=torch.cuda.current_device())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
        if failed.item():
            raise RuntimeError(f"memory of {2 * self._half_bytes:,} bytes that peers can read: "
                               f"{failure or 'failed on another rank'}")
        return made

    def _next_half(self, needed_bytes: int) -> int:
        """Which half is next; all ranks ask for the same sizes."""
        if needed_bytes > self._half_bytes:
            self.reserve(needed_bytes)
        return next(self._halves)

    def _slot(self, rank: int, half: int, like: Tensor, number: int = 0) -> Tensor:
        """A tensor like another in a rank's half."""
        offset_bytes = half * self._half_bytes + number * like.nbytes
        return self._memory.get_buffer(rank, like.shape, like.dtype, offset_bytes // like.element_size())


_connected: dict[dist.ProcessGroup, PeerMemory] = {}


def peer_memory(group: dist.ProcessGroup | None) -> PeerMemory | None:
    """That of a group that was connected; else None, and its collectives are NCCL's or gloo's."""
    return None if group is None else _connected.get(group)


def connect(group: dist.ProcessGroup) -> None:
    """Let collectives of a group go through its ranks' memory, if they are GPUs of one machine that see each other's.

    All its ranks call this. Raises UserError where the driver should give that view and does not.
    """
    if group.size() == 1 or dist.get_backend(group) != "nccl":
        return
    if not _see_each_other(dist.get_process_group_ranks(group)):
        logger.info("tensor parallelism: NCCL, because its %d GPUs do not see each other's memory", group.size())
        return
    peers = PeerMemory(group)
    try:
        peers.reserve(FIRST_HALF_BYTES)
    except RuntimeError as error:
        raise UserError(f"tensor parallelism: GPUs could not map each other's memory ({error}); "
                        "--disable-tp-comm-overlap does without") from None
    _connected[group] = peers
    logger.info("tensor parallelism: %d GPUs fetch from each other's memory while they compute", group.size())


def _see_each_other(ranks: Sequence[int]) -> bool:
    """By torchrun's order: a machine's ranks follow each other, one a GPU."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = [rank % here for rank in ranks]
    return len({rank // here for rank in ranks}) == 1 and max(devices) < torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(one, other) for one, other in itertools.permutations(devices, 2))
