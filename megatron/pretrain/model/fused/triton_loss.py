"""Cross entropy over one rank's part of the vocabulary: 16-bit logits are read once each way, fp32 stays inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
WARPS = 16


def statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [tokens, part], which begin at vocabulary id `first`: (maximum, sum of exp(logit - maximum),
    logit of the label or 0 where another rank holds it), each fp32 [tokens]."""
    tokens, width = logits.shape
    maximum, total, target = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(3))
    cross_entropy_statistics[(tokens,)](logits, labels, maximum, total, target, first, WIDTH=width,
                                        BLOCK=_block(width), num_warps=WARPS)
    return maximum, total, target


def gradient_(logits: Tensor, labels: Tensor, first: int, log_total: Tensor, scale: Tensor) -> None:
    """Overwrite logits [tokens, part] with scale[token] * (softmax - one-hot); log_total is log sum exp."""
    tokens, width = logits.shape
    cross_entropy_gradient[(tokens, triton.cdiv(width, _block(width)))](
        logits, labels, log_total, scale, first, WIDTH=width, BLOCK=_block(width), num_warps=WARPS)


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


@triton.jit
def cross_entropy_statistics(logits, labels, maximum_at, total_at, target_at, first, WIDTH: tl.constexpr,
                             BLOCK: tl.constexpr):
    """One token's row, with the running maximum of the online softmax (Milakov & Gimelshein, 2018)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * WIDTH
    maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for offset in range(0, WIDTH, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        value = tl.load(start + column, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(value, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(value - higher), axis=0)
        maximum = higher
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < WIDTH)
    target = tl.load(start + tl.where(mine, label, 0)).to(tl.float32)
    tl.store(maximum_at + row, maximum)
    tl.store(total_at + row, total)
    tl.store(target_at + row, tl.where(mine, target, 0.0))


@triton.jit
def cross_entropy_gradient(logits, labels, log_total_at, scale_at, first, WIDTH: tl.constexpr,
                           BLOCK: tl.constexpr):
    """One block of one token's row, in place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * WIDTH + column
    value = tl.load(at, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
    label = tl.load(labels + row) - first
    softmax = tl.exp(value - tl.load(log_total_at + row))
    gradient = tl.load(scale_at + row) * (softmax - tl.where(column == label, 1.0, 0.0))
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < WIDTH)
