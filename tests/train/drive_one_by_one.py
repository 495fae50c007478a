"""Run by test_recording.py under torchrun: a step's micro-batches one by one, as they are recorded, beside the
engine's schedule over all of them.

    torchrun --nproc_per_node 2 drive_one_by_one.py [FLAGS]
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.data.batches import MicroBatch
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.optim.optimizer import build_optimizer
from megatron.pretrain.train import step

SHAPE = ("--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --seq-length 8 "
         "--micro-batch-size 2 --global-batch-size 12 --train-iters 9 --lr 0.1 --transformer-impl fused "
         "--untie-embeddings-and-output-weights").split()


class OneByOne:
    """`Recording` without what it records: micro-batches run as they come."""

    def __init__(self, chunk: torch.nn.Module, count: int) -> None:
        self._chunk, self._count = chunk, count

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return step._one_micro_batch(self._chunk, self._count, inputs)


def batches(rank: int) -> list[MicroBatch]:
    random = np.random.default_rng(rank)
    drawn = random.integers(0, 64, (3, 2, 9))
    masks = (random.random((3, 2, 8)) < 0.7).astype(np.float32)
    return [MicroBatch(tokens=np.ascontiguousarray(one[:, :-1]), labels=np.ascontiguousarray(one[:, 1:]),
                       loss_mask=mask) for one, mask in zip(drawn, masks, strict=True)]


def main(flags: list[str]) -> None:
    config = settle(parse([*SHAPE, *flags]).config, world_size=2)
    with placed(config) as place:
        chunks = build_model(config, 64, place.device)
        step.connect(chunks, build_optimizer(config, chunks))
        totals, gradients = [], []
        for recording in (None, OneByOne(chunks[0], 3)):
            step.unwrap_model(chunks[0]).recording = recording
            for parameter in chunks[0].parameters():
                # What a step finds there must not count.
                parameter.main_grad.fill_(torch.nan)
            totals.append(step.forward_backward(chunks, batches(place.rank)))
            gradients.append([parameter.main_grad.clone() for parameter in chunks[0].parameters()])
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)
        for scheduled, apart in zip(*gradients, strict=True):
            torch.testing.assert_close(scheduled, apart, rtol=1e-5, atol=1e-7)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients[0])
    if place.is_main:
        print("gradients: equal, losses: equal")


if __name__ == "__main__":
    main(sys.argv[1:])
