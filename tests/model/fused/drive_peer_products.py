"""Run by test_peers.py under torchrun: two tensor-parallel ranks whose products are cut as where GPUs are peers.

    torchrun --nproc_per_node 2 drive_peer_products.py [FLAGS]

What peers do in their memory is done by gloo here, in the order in which they hand over and ask for parts; the
layers that are cut are the real ones, and must give what they give uncut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.data.batches import MicroBatch
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.model.fused import peers
from megatron.pretrain.optim.optimizer import build_optimizer
from megatron.pretrain.train import step

SHAPE = ("--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 32 "
         "--micro-batch-size 2 --train-iters 9 --lr 0.1 --transformer-impl fused --sequence-parallel "
         "--tensor-model-parallel-size 2 --untie-embeddings-and-output-weights").split()


class GlooPeers:
    """`PeerMemory`'s collectives, and how often each was asked for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()
        self.calls = {"gather": 0, "scatter_sum": 0}

    def meet(self) -> None:
        dist.barrier(self._group)

    def gather(self, shard: Tensor, whole: Tensor, consume: Callable[[Tensor, int], None]) -> None:
        self.calls["gather"] += 1
        dist.all_gather_into_tensor(whole, shard, group=self._group)
        for peer in (self.rank, 1 - self.rank):
            consume(whole.chunk(self.size)[peer], peer)

    def scatter_sum(self, shard: Tensor, produce: Callable[[int, Tensor], None]) -> Callable[[], None]:
        self.calls["scatter_sum"] += 1
        others, arrived = torch.full_like(shard, torch.nan), torch.empty_like(shard)
        produce(1 - self.rank, others)
        produce(self.rank, shard)
        requests = [dist.isend(others, group=self._group, group_dst=1 - self.rank),
                    dist.irecv(arrived, group=self._group, group_src=1 - self.rank)]

        def finish() -> None:
            for request in requests:
                request.wait()
            shard.add_(arrived)

        return finish


def main(flags: list[str]) -> None:
    config = settle(parse([*SHAPE, *flags]).config, world_size=2)
    drawn = np.random.default_rng(0).integers(0, 128, (2, 33))
    batch = MicroBatch(tokens=np.ascontiguousarray(drawn[:, :-1]), labels=np.ascontiguousarray(drawn[:, 1:]),
                       loss_mask=np.ones((2, 32), np.float32))
    with placed(config) as place:
        chunks = build_model(config, 128, place.device)
        step.connect(chunks, build_optimizer(config, chunks))
        group = parallel_state.get_tensor_model_parallel_group()
        whole = run(chunks, batch)
        peers._connected[group] = cut = GlooPeers(group)
        parts = run(chunks, batch)
        del peers._connected[group]
        assert min(cut.calls.values()) >= 4 * config.model.num_layers, cut.calls
        tolerance = 2e-2 if config.train.bf16 else 1e-5
        for number, (one, other) in enumerate(zip(whole, parts, strict=True)):
            error = float((one - other).norm() / one.norm())
            assert error < tolerance, (number, error)
    if place.is_main:
        print("cut products: equal")


def run(chunks: step.Chunks, batch: MicroBatch) -> list[Tensor]:
    """The step's loss and gradients, as one vector each."""
    total = step.forward_backward(chunks, [batch])
    return [total, *(parameter.main_grad.clone() for parameter in chunks[0].parameters())]


if __name__ == "__main__":
    main(sys.argv[1:])
