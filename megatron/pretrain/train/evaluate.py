"""The loss on the validation split."""

from __future__ import annotations

import torch

from megatron.pretrain.data.batches import Loader
from megatron.pretrain.data.dataset import PretrainDataset
from megatron.pretrain.train.run import Run
from megatron.pretrain.train.step import forward_backward, mean_loss, take


@torch.no_grad()
def evaluate(run: Run, dataset: PretrainDataset) -> float:
    """Mean loss over --eval-iters global batches, always the same ones, with dropout off."""
    for chunk in run.chunks:
        chunk.eval()
    losses = []
    with Loader(dataset, run.batches, num_workers=run.config.data.num_workers) as loader:
        for _ in range(run.config.train.eval_iters):
            micro_batches = take(loader, run.batches.micro_batches)
            losses.append(mean_loss(forward_backward(run.chunks, micro_batches, forward_only=True)))
    for chunk in run.chunks:
        chunk.train()
    return sum(losses) / len(losses)
