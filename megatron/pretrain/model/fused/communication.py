"""Collectives of tensor and sequence parallelism that run beside products.

Where the GPUs see each other's memory (`peers`), a product is cut by the ranks whose rows it computes, so that its
parts wait for no more than they need. Elsewhere NCCL's collectives start as early and are waited for as late as
can be. The engine's launch rule holds: with CUDA_DEVICE_MAX_CONNECTIONS=1 a collective that was started before a
product is also scheduled before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron.pretrain.model.fused.peers import peer_memory

KEPT_UP_TO_RANKS = 2

Consume = Callable[[Tensor, slice], None]
"""Is given rows of a whole, and where in it they are."""
Produce = Callable[[slice, Tensor], None]
"""Writes those rows of a whole into a tensor of their size."""


@dataclass(frozen=True)
class Pending:
    """A tensor that is ready after `wait`."""

    tensor: Tensor
    finish: Callable[[], object] | None = None

    def wait(self) -> Tensor:
        if self.finish is not None:
            self.finish()
        return self.tensor


def ready(tensor: Tensor) -> Pending:
    """A tensor that needs no collective."""
    return Pending(tensor)


def gather(shard: Tensor, group: dist.ProcessGroup) -> Pending:
    """[s / n, ...] of each of the group's n ranks -> [s, ...] on all."""
    whole = shard.new_empty(shard.size(0) * group.size(), *shard.shape[1:])
    return Pending(whole, dist.all_gather_into_tensor(whole, shard.contiguous(), group=group, async_op=True).wait)


def gather_into(shard: Tensor, group: dist.ProcessGroup | None, consume: Consume) -> Tensor:
    """Let `consume` have all rows of `gather`, in one or in several parts; returns the whole. No group: the shard."""
    if group is None:
        whole = shard.contiguous()
        consume(whole, slice(0, whole.size(0)))
        return whole
    if (peers := peer_memory(group)) is None:
        whole = gather(shard, group).wait()
        consume(whole, slice(0, whole.size(0)))
        return whole
    whole = shard.new_empty(shard.size(0) * group.size(), *shard.shape[1:])
    peers.gather(shard.contiguous(), whole, lambda rows, rank: consume(rows, _place(rank, shard.size(0))))
    return whole


def to_keep(shard: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What the backward pass is to keep of an input that was gathered: `again` makes it whole there.

    For two ranks the whole costs a twelfth more activations a layer and saves two of its ten collectives; for
    more ranks it would cost up to half, which is what sequence parallelism is there to save.
    """
    return whole if group is None or group.size() <= KEPT_UP_TO_RANKS else shard


def again(kept: Tensor, length: int, group: dist.ProcessGroup | None) -> Pending:
    """The whole [length, ...] of what `to_keep` chose."""
    return ready(kept) if kept.size(0) == length else gather(kept, group)


def scatter_sum(produce: Produce, shape: Sequence[int], like: Tensor, group: dist.ProcessGroup) -> Pending:
    """Of the sum over n ranks of what they `produce`, a whole of this shape [s, ...]: each rank's [s / n, ...]."""
    shard = like.new_empty(shape[0] // group.size(), *shape[1:])
    if (peers := peer_memory(group)) is not None:
        return Pending(shard, peers.scatter_sum(
            shard, lambda rank, out: produce(_place(rank, shard.size(0)), out)))
    partial = like.new_empty(*shape)
    produce(slice(0, shape[0]), partial)
    return Pending(shard, dist.reduce_scatter_tensor(shard, partial, group=group, async_op=True).wait)


def total(partial: Tensor, group: dist.ProcessGroup) -> Pending:
    """Partial sums -> their sum on every rank, in place."""
    return Pending(partial, dist.all_reduce(partial, group=group, async_op=True).wait)


def summed(produce: Produce, shape: Sequence[int], like: Tensor, group: dist.ProcessGroup | None,
           sequence_parallel: bool) -> Pending:
    """What the ranks of a group `produce` parts of, a whole of this shape [s, ...]: with `sequence_parallel` a
    shard of the sum, else all of it; without a group what this rank produces."""
    if group is not None and sequence_parallel:
        return scatter_sum(produce, shape, like, group)
    partial = like.new_empty(*shape)
    produce(slice(0, shape[0]), partial)
    return ready(partial) if group is None else total(partial, group)


def _place(rank: int, length: int) -> slice:
    return slice(rank * length, (rank + 1) * length)
