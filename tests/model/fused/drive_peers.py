"""Run by test_peers.py under torchrun, a rank a GPU: collectives through peers' memory beside NCCL's.

Sizes change, so that the memory is made anew. All collectives of a size follow each other without the host
waiting, and before each a rank's part, or its reading of others' parts, is late at random: one that read what is
not yet there, or overwrote what another rank still reads, would show.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.pretrain.model.fused.peers import PeerMemory

ROWS = (64, 4096, 256)
WIDTH, ROUNDS = 1024, 20
LATEST_CYCLES = 400_000
"""Some 0.2 ms: longer than a collective takes."""


def gather(peers: PeerMemory, shard: Tensor) -> tuple[Tensor, Tensor]:
    """The whole by peers, and what was there of each part when it was handed over."""
    whole = shard.new_full((shard.size(0) * peers.size, WIDTH), torch.nan)
    seen = torch.full_like(whole, torch.nan)
    peers.gather(shard, whole, lambda rows, rank: seen.chunk(peers.size)[rank].copy_(rows))
    return whole, seen


def scatter_sum(peers: PeerMemory, partial: Tensor, late: Callable[[], None]) -> Tensor:
    """This rank's sum by peers."""
    parts = partial.chunk(peers.size)
    total = torch.full_like(parts[0], torch.nan)

    def produce(peer: int, out: Tensor) -> None:
        late()
        out.copy_(parts[peer])

    peers.scatter_sum(total, produce)()
    return total


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, size = dist.get_rank(), dist.get_world_size()
    peers = PeerMemory(dist.group.WORLD)
    peers.reserve(1)    # too little for any: made anew by the first
    torch.manual_seed(rank)
    lateness = random.Random(rank)

    def late() -> None:
        stream = lateness.choice((torch.cuda.current_stream(), peers._stream))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(lateness.randrange(LATEST_CYCLES))

    for rows in ROWS * 3:
        shards = [torch.randn(rows, WIDTH, device=device).bfloat16() for _ in range(ROUNDS)]
        # Whole numbers: their sums are exact in any order.
        partials = [torch.randint(-8, 9, (rows * size, WIDTH), device=device).bfloat16() for _ in range(ROUNDS)]
        wholes = [shard.new_empty(rows * size, WIDTH) for shard in shards]
        totals = [torch.empty_like(shard) for shard in shards]
        for shard, whole, partial, total in zip(shards, wholes, partials, totals, strict=True):
            dist.all_gather_into_tensor(whole, shard)
            dist.reduce_scatter_tensor(total, partial)
        torch.cuda.synchronize()

        gathered, summed = [], []
        for number, (shard, partial) in enumerate(zip(shards, partials, strict=True)):
            if number % 4 == 0:
                peers.meet()
            late()
            gathered.append(gather(peers, shard))
            for _ in range(1 + number % 2):    # two of a kind follow each other, too
                late()
                total = scatter_sum(peers, partial, late)
            summed.append(total)
        for (whole, seen), expected in zip(gathered, wholes, strict=True):
            assert torch.equal(seen, whole), "a part was handed over before it was there"
            assert torch.equal(whole, expected)
        for total, expected in zip(summed, totals, strict=True):
            assert torch.equal(total, expected)
    torch.cuda.synchronize()
    if rank == 0:
        print("gather: equal, scatter_sum: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
