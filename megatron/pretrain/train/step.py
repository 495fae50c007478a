"""One global batch through megatron-core's schedule: forward, backward, and the loss that is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from torch import Tensor

from megatron.pretrain.data.batches import MicroBatch
from megatron.pretrain.model.fused.fp8_model import fp8_states

Chunks = list[DistributedDataParallel]


def connect(chunks: Chunks, optimizer: MegatronOptimizer) -> None:
    """Tell the engine's schedule how gradients are scaled, finished and overlapped."""
    engine = get_model_config(chunks[0])
    engine.finalize_model_grads_func = finalize_model_grads
    engine.grad_scale_func = optimizer.scale_loss
    one = len(chunks) == 1
    if chunks[0].ddp_config.overlap_grad_reduce:
        engine.no_sync_func = chunks[0].no_sync if one else [chunk.no_sync for chunk in chunks]
    if chunks[0].ddp_config.overlap_param_gather:
        sync = [chunk.start_param_sync for chunk in chunks]
        engine.param_sync_func = sync[0] if one else sync


def forward_backward(chunks: Chunks, micro_batches: Sequence[MicroBatch], *, forward_only: bool = False) -> Tensor:
    """Run one global batch's micro-batches; gradients are left in the chunks' buffers.

    Returns float64 [2] on the last pipeline stage, zeros elsewhere: the sum of this rank's loss terms and
    of their weights. Their quotient, both summed over data-parallel ranks, is the loss that is minimised:
    a mean over micro-batches of the mean over tokens, or with --calculate-per-token-loss over all tokens.
    """
    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    return accumulate(chunks, micro_batches, forward_only=forward_only)


def accumulate(chunks: Chunks, micro_batches: Sequence[MicroBatch], *, forward_only: bool = False) -> Tensor:
    """`forward_backward` on top of the gradients that the chunks' buffers hold already."""
    engine = get_model_config(chunks[0])
    for state in fp8_states(chunks):
        state.begin_step()
    size, length = micro_batches[0].tokens.shape
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, device=torch.device(torch.cuda.current_device())),
        data_iterator=_iterators(chunks, micro_batches), model=chunks, num_microbatches=len(micro_batches),
        seq_length=length, micro_batch_size=size, forward_only=forward_only)
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["loss"] if engine.calculate_per_token_loss else _mean_of(report["loss"])
    return total


def end_step(chunks: Chunks) -> None:
    """After the optimizer's step: what the next one needs to know of this one's numbers."""
    for state in fp8_states(chunks):
        state.end_step(parallel_state.get_amax_reduction_group(with_context_parallel=True))


def mean_loss(total: Tensor) -> float:
    """The loss of `forward_backward`'s totals over all data-parallel ranks; the last stage's, on every rank."""
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(total, parallel_state.get_pipeline_model_parallel_last_rank(),
                       group=parallel_state.get_pipeline_model_parallel_group())
    terms, weights = total.tolist()
    return terms / max(weights, 1.0)


def take(loader: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
    """The next global batch's micro-batches of this rank."""
    return list(islice(loader, count))


def _iterators(chunks: Chunks, micro_batches: Sequence[MicroBatch]) -> Any:
    """Each chunk of an interleaved pipeline walks through the micro-batches by itself."""
    return iter(micro_batches) if len(chunks) == 1 else [iter(micro_batches) for _ in chunks]


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module, *,
                  device: torch.device) -> tuple[Tensor, Callable]:
    batch = _on_device(next(batches), device)
    losses = model(batch["tokens"], position_ids=None, attention_mask=None, labels=batch["labels"])
    return losses, partial(_loss, batch["loss_mask"], get_model_config(model).calculate_per_token_loss)


def _on_device(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True)
               for name in ("tokens", "labels", "loss_mask")}
    if parallel_state.get_context_parallel_world_size() > 1:
        tensors = get_batch_on_this_cp_rank(tensors)
    return tensors


def _loss(loss_mask: Tensor, per_token: bool, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """losses and loss_mask [b, s] -> the sum to differentiate, its tokens, and what to report.

    The schedule divides the sum by its tokens and the micro-batches, or with per-token loss leaves that to
    the reduction of gradients. Under context parallelism a rank holds part of each sequence.
    """
    summed = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    report = torch.stack([summed.detach(), tokens])
    shards = parallel_state.get_context_parallel_world_size()
    if shards > 1:
        dist.all_reduce(report, group=parallel_state.get_context_parallel_group())
        if not per_token:
            summed, tokens = summed * shards, report[1]
    return summed, tokens.to(torch.int), {"loss": report}


def _mean_of(report: Tensor) -> Tensor:
    """[sum, tokens] of a micro-batch as the one term it adds to a mean over micro-batches."""
    return torch.stack([report[0] / report[1].clamp(min=1), torch.ones_like(report[1])])
