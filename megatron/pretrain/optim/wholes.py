"""A distributed optimizer's tensors, whole, each in the hands of one of the ranks that share it.

Data-parallel ranks hold contiguous pieces of every weight's moments and master copy. A checkpoint holds whole tensors,
so that any layout can load it. So each weight has an owner among the ranks, who takes the others' pieces to save it,
and hands them out after a load: all ranks write and read, and none holds more than its share of the state besides its
pieces. The engine's way to the same files ("fully_reshardable") gives every rank all of the state, on its host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Piece:
    """The numbers of a flat weight, from `start` up to `end`, whose state a rank of the group holds."""

    rank: int
    start: int
    end: int

    @property
    def place(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Whole:
    """A weight, and where its state is."""

    weight: Parameter
    owner: int
    """A rank of the group, which need not hold a piece."""
    pieces: tuple[Piece, ...]

    def piece_of(self, rank: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.rank == rank), None)


def wholes(part: DistributedOptimizer) -> list[Whole]:
    """All weights of the optimizer, in one order on all of its data-parallel ranks, which call this together."""
    group = part.data_parallel_group
    weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
    ranges = torch.zeros(len(weights), 2, dtype=torch.int64)
    for number, weight in enumerate(weights):
        if weight in part.model_param_gbuf_map:
            local = part._get_model_param_range_map(weight)["param"]
            ranges[number] = torch.tensor([local.start, local.end])
    ranges = ranges.to(weights[0].device)
    of_ranks = [torch.empty_like(ranges) for _ in range(group.size())]
    dist.all_gather(of_ranks, ranges, group=group)
    table = torch.stack(of_ranks, dim=1).tolist()
    owners = shared_out([weight.numel() for weight in weights], group.size())
    return [Whole(weight, owner, tuple(Piece(rank, *ends) for rank, ends in enumerate(row) if ends[0] < ends[1]))
            for weight, owner, row in zip(weights, owners, table, strict=True)]


def shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """An owner for each of these sizes, so that all ranks own about as much: the largest first, to who has least."""
    owned, owners = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = owned.index(min(owned))
        owned[owners[number]] += sizes[number]
    return owners


def gather(part: DistributedOptimizer, whole: Whole, name: str) -> Tensor | None:
    """Its owner's: the whole of a weight's tensor `name` ("param", "exp_avg", ...), fp32, flat; None on other ranks.

    On the host where it was put together, and otherwise the optimizer's own tensor. All ranks call this together.
    """
    group = part.data_parallel_group
    own = whole.piece_of(group.rank())
    held = None if own is None else part._get_main_param_and_optimizer_states(whole.weight)[name].detach()
    if whole.owner != group.rank():
        _exchange([] if own is None else [_operation(part, dist.isend, held.contiguous(), whole.owner)])
        return None
    if own is not None and len(whole.pieces) == 1:
        return held
    joined = torch.empty(whole.weight.numel(), device=whole.weight.device)
    if own is not None:
        joined[own.place] = held
    _exchange([_operation(part, dist.irecv, joined[piece.place], piece.rank)
               for piece in whole.pieces if piece is not own])
    return joined.cpu()


def scatter(part: DistributedOptimizer, whole: Whole, values: Tensor | None) -> Tensor | None:
    """This rank's piece of a weight's tensor, of which the owner has all `values`; None where it holds none."""
    group = part.data_parallel_group
    own = whole.piece_of(group.rank())
    if whole.owner != group.rank():
        if own is None:
            return None
        piece = torch.empty(own.end - own.start, device=whole.weight.device)
        _exchange([_operation(part, dist.irecv, piece, whole.owner)])
        return piece
    flat = values.flatten().to(whole.weight.device)
    _exchange([_operation(part, dist.isend, flat[piece.place], piece.rank)
               for piece in whole.pieces if piece is not own])
    return None if own is None else flat[own.place]


def _operation(part: DistributedOptimizer, kind: object, values: Tensor, rank: int) -> dist.P2POp:
    return dist.P2POp(kind, values, dist.get_global_rank(part.data_parallel_group, rank), part.data_parallel_group)


def _exchange(operations: list[dist.P2POp]) -> None:
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
