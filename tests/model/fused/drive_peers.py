"""Run by test_peers.py under torchrun, a rank a GPU: collectives through peers' memory beside NCCL's.

Sizes change, so that the memory is made anew; collectives follow each other without a pause, so that one that
overwrote what another rank still reads would show.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.pretrain.model.fused.peers import PeerMemory

ROWS = (64, 4096, 256)
WIDTH, ROUNDS = 1024, 20


def gathered(peers: PeerMemory, shard: Tensor, size: int) -> Tensor:
    """The whole by peers, each part taken as it is handed over."""
    whole = shard.new_full((shard.size(0) * size, WIDTH), torch.nan)
    seen = torch.full_like(whole, torch.nan)
    peers.gather(shard, whole, lambda rows, rank: seen.chunk(size)[rank].copy_(rows))
    assert torch.equal(seen, whole), "a part was handed over before it was there"
    return whole


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    size, rank = dist.get_world_size(), dist.get_rank()
    peers = PeerMemory(group)
    torch.manual_seed(rank)
    for rows in ROWS * ROUNDS:
        shard = torch.randn(rows, WIDTH, device=device).bfloat16()
        expected = shard.new_empty(rows * size, WIDTH)
        dist.all_gather_into_tensor(expected, shard)
        assert torch.equal(gathered(peers, shard, size), expected)

        # Whole numbers: their sums are exact in any order.
        partial = torch.randint(-8, 9, (rows * size, WIDTH), device=device).bfloat16()
        total, ours = shard.new_empty(rows, WIDTH), shard.new_full((rows, WIDTH), torch.nan)
        dist.reduce_scatter_tensor(total, partial)
        finish = peers.scatter_sum(ours, lambda peer, out, parts=partial.chunk(size): out.copy_(parts[peer]))
        finish()
        assert torch.equal(ours, total)
        peers.meet()
    torch.cuda.synchronize()
    if rank == 0:
        print("gather: equal, scatter_sum: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
