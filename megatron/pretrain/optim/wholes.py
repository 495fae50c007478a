"""A distributed optimizer's tensors, whole, each in the hands of one of the ranks that share it.

Data-parallel ranks hold contiguous pieces of every weight's moments and master copy. A checkpoint holds whole tensors,
so that any layout can load it. So each tensor has an owner among the ranks, who joins the pieces to save it, and hands
them out after a load: all ranks write and read, and none holds more of it on its host than its share and one tensor.
The engine's way to the same files ("fully_reshardable") gives every rank all of the state, on its host.

Tensors travel through the collectives of every step, as a sum and a broadcast, and not from rank to rank: NCCL would
allocate for each pair that talks for the first time, at the first save of a run whose memory is full.
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
    """A tensor of the optimizer, `name` ("param", "exp_avg", ...) of a weight, and where it is."""

    weight: Parameter
    name: str
    owner: int
    """A rank of the group, which need not hold a piece."""
    pieces: tuple[Piece, ...]

    def piece_of(self, rank: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.rank == rank), None)

    @property
    def is_at_its_owner(self) -> bool:
        return [piece.rank for piece in self.pieces] == [self.owner]


def wholes(part: DistributedOptimizer, names: Sequence[str]) -> list[Whole]:
    """These tensors of all weights, in one order on all data-parallel ranks, which call this together.

    RuntimeError where the ranks' pieces do not make a weight: what was joined would be garbage.
    """
    weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
    pieces = _pieces(part, weights)
    for weight, parts in zip(weights, pieces, strict=True):
        ends = [0, *(end for piece in sorted(parts, key=lambda piece: piece.start) for end in (piece.start, piece.end)),
                weight.numel()]
        if ends[::2] != ends[1::2]:
            raise RuntimeError(f"data-parallel ranks hold {parts} of a weight of {weight.numel()} numbers")
    owners = iter(shared_out([weight.numel() for weight in weights for _ in names], part.data_parallel_group.size()))
    return [Whole(weight, name, next(owners), parts)
            for weight, parts in zip(weights, pieces, strict=True) for name in names]


def _pieces(part: DistributedOptimizer, weights: Sequence[Parameter]) -> list[tuple[Piece, ...]]:
    """Who holds what of these weights."""
    ranges = torch.zeros(len(weights), 2, dtype=torch.int64)
    for number, weight in enumerate(weights):
        if weight in part.model_param_gbuf_map:
            local = part._get_model_param_range_map(weight)["param"]
            ranges[number] = torch.tensor([local.start, local.end])
    ranges = ranges.to(weights[0].device)
    of_ranks = [torch.empty_like(ranges) for _ in range(part.data_parallel_group.size())]
    dist.all_gather(of_ranks, ranges, group=part.data_parallel_group)
    return [tuple(Piece(rank, start, end) for rank, (start, end) in enumerate(row) if start < end)
            for row in torch.stack(of_ranks, dim=1).tolist()]


def shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """An owner for each of these sizes, so that all ranks own about as much: the largest first, to who has least."""
    owned, owners = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = owned.index(min(owned))
        owned[owners[number]] += sizes[number]
    return owners


def gather(part: DistributedOptimizer, whole: Whole) -> Tensor | None:
    """The tensor, fp32 and flat, at its owner; None on other ranks. All ranks call this together.

    On the host where it was joined, and otherwise the optimizer's own.
    """
    group = part.data_parallel_group
    is_owner, own = whole.owner == group.rank(), whole.piece_of(group.rank())
    held = None if own is None else part._get_main_param_and_optimizer_states(whole.weight)[whole.name].detach()
    if whole.is_at_its_owner:
        return held
    joined = torch.zeros(whole.weight.numel(), device=whole.weight.device)
    if own is not None:
        joined[own.place] = held
    # Nobody else has numbers in a piece's place. Sums of integers leave all bits as they are, -0 among them.
    dist.reduce(joined.view(torch.int32), dist.get_global_rank(group, whole.owner), group=group)
    return joined.cpu() if is_owner else None


def scatter(part: DistributedOptimizer, whole: Whole, values: Tensor | None) -> Tensor | None:
    """This rank's piece of a tensor, of which the owner has all `values`; None where it holds none."""
    group = part.data_parallel_group
    own = whole.piece_of(group.rank())
    flat = None if values is None else values.flatten().to(whole.weight.device)
    if whole.is_at_its_owner:
        return flat
    if flat is None:
        flat = torch.empty(whole.weight.numel(), device=whole.weight.device)
    dist.broadcast(flat, dist.get_global_rank(group, whole.owner), group=group)
    return None if own is None else flat[own.place].clone()    # a view would keep the whole
