"""Collectives of tensor and sequence parallelism that run beside a product.

Each starts at once and is waited for where its result is needed. The engine's launch rule holds here too: with
CUDA_DEVICE_MAX_CONNECTIONS=1 a collective that was started before a product is also scheduled before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


KEPT_UP_TO_RANKS = 2


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


def to_keep(shard: Tensor, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the backward pass is to keep of an input that was gathered: `again` makes it whole there.

    For two ranks the whole costs a twelfth more activations a layer and saves two of its ten collectives; for
    more ranks it would cost up to half, which is what sequence parallelism is there to save.
    """
    return whole if group.size() <= KEPT_UP_TO_RANKS else shard


def again(kept: Tensor, length: int, group: dist.ProcessGroup) -> Pending:
    """The whole [length, ...] of what `to_keep` chose."""
    return ready(kept) if kept.size(0) == length else gather(kept, group)


def scatter_sum(partial: Tensor, group: dist.ProcessGroup) -> Pending:
    """Partial sums [s, ...] on n ranks -> each rank's [s / n, ...] of their sum."""
    shard = partial.new_empty(partial.size(0) // group.size(), *partial.shape[1:])
    return Pending(shard, dist.reduce_scatter_tensor(shard, partial, group=group, async_op=True).wait)


def total(partial: Tensor, group: dist.ProcessGroup) -> Pending:
    """Partial sums -> their sum on every rank, in place."""
    return Pending(partial, dist.all_reduce(partial, group=group, async_op=True).wait)


def reduce_gradient(partial: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Pending:
    """The input's gradient of a column-parallel layer, of which each rank of `group` has a part."""
    if group is None:
        return ready(partial)
    return scatter_sum(partial, group) if sequence_parallel else total(partial, group)
