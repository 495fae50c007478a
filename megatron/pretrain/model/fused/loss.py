"""Vocabulary-parallel cross entropy that never holds fp32 logits of a whole micro-batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS_AT_ONCE = 1024


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup, kernel: str) -> Tensor:
    """logits [s, b, vocabulary / ranks], labels [s, b] -> each token's loss in fp32 [s, b].

    The backward pass overwrites the logits with their gradient, so nothing else may read them. On CUDA
    with kernel "triton"; with "torch" in slices of `ROWS_AT_ONCE` tokens on any device.
    """
    return _CrossEntropy.apply(logits, labels, group, kernel)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, kernel: str) -> Tensor:
        part = _module(kernel)
        rows, wanted = logits.flatten(0, 1), labels.flatten()
        first = group.rank() * rows.size(1)
        maximum, total, target = part.statistics(rows, wanted, first)
        log_total, target = _over_ranks(maximum, total, target, group)
        ctx.save_for_backward(logits, labels, log_total)
        ctx.first, ctx.part = first, part
        return (log_total - target).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, log_total = ctx.saved_tensors
        ctx.part.gradient_(logits.flatten(0, 1), labels.flatten(), ctx.first, log_total,
                           gradient.float().contiguous().flatten())
        return logits, None, None, None


def _over_ranks(maximum: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Each rank's statistics of its part -> (log sum exp of the whole vocabulary, the label's logit)."""
    if group.size() > 1:
        highest = maximum.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * torch.exp(maximum - highest), target])
        dist.all_reduce(sums, group=group)
        maximum, (total, target) = highest, sums
    return maximum + torch.log(total), target


def _module(kernel: str) -> Any:
    if kernel == "triton":
        from megatron.pretrain.model.fused import triton_loss

        return triton_loss
    return _Torch


class _Torch:
    """What `triton_loss` computes, in slices of rows."""

    @staticmethod
    def statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        maximum, total, target = [], [], []
        for rows, wanted in zip(logits.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
            values = rows.float()
            maximum.append(values.amax(-1))
            total.append((values - maximum[-1][:, None]).exp().sum(-1))
            mine, column = _held(wanted, first, rows.size(1))
            target.append(values.gather(1, column[:, None])[:, 0] * mine)
        return torch.cat(maximum), torch.cat(total), torch.cat(target)

    @staticmethod
    def gradient_(logits: Tensor, labels: Tensor, first: int, log_total: Tensor, scale: Tensor) -> None:
        slices = (part.split(ROWS_AT_ONCE) for part in (logits, labels, log_total, scale))
        for rows, wanted, logs, scales in zip(*slices, strict=True):
            values = (rows.float() - logs[:, None]).exp()
            mine, column = _held(wanted, first, rows.size(1))
            values.scatter_add_(1, column[:, None], -mine[:, None].float())
            rows.copy_(values * scales[:, None])


def _held(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(whether this rank holds the label, its column here or 0)."""
    mine = (labels >= first) & (labels < first + width)
    return mine, torch.where(mine, labels - first, 0)
