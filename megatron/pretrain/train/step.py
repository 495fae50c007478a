"""One global batch through megatron-core's schedule: forward, backward, and the loss that is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config, unwrap_model
from torch import Tensor

from megatron.pretrain.data.batches import MicroBatch
from megatron.pretrain.model.fused.fp8_model import fp8_states
from megatron.pretrain.model.fused.peers import peer_memory
from megatron.pretrain.train.recording import Recording

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
    for state in fp8_states(chunks):
        state.begin_step()
    recording = getattr(unwrap_model(chunks[0]), "recording", None)
    if recording is None or forward_only:
        reports = _scheduled(chunks, micro_batches, forward_only=forward_only)
    else:
        reports = _replayed(chunks[0], recording, micro_batches)
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report if get_model_config(chunks[0]).calculate_per_token_loss else _mean_of(report)
    return total


def record(chunk: DistributedDataParallel, micro_batches: int) -> None:
    """Let `accumulate` run a model's micro-batches, so many a step, as CUDA graphs once they are recorded."""
    model = unwrap_model(chunk)
    model.recording = Recording(partial(_one_micro_batch, chunk, micro_batches), model.accumulated_weights())


def release(chunks: Chunks) -> None:
    """After the last step, and before the process groups are left: let go what holds their collectives."""
    for chunk in chunks:
        if (recording := getattr(unwrap_model(chunk), "recording", None)) is not None:
            recording.close()


def end_step(chunks: Chunks) -> None:
    """After the optimizer's step: what the next one needs to know of this one's numbers."""
    for state in fp8_states(chunks):
        state.end_step(parallel_state.get_amax_reduction_group(with_context_parallel=True))


def meet_peers() -> None:
    """Before tensor-parallel ranks do what they did at another time, in another order, or as a graph."""
    if (peers := peer_memory(parallel_state.get_tensor_model_parallel_group())) is not None:
        peers.meet()


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


def _scheduled(chunks: Chunks, micro_batches: Sequence[MicroBatch], *, forward_only: bool) -> list[Tensor]:
    """Micro-batches by the engine's schedule; a report of each."""
    meet_peers()
    size, length = micro_batches[0].tokens.shape
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step, data_iterator=_iterators(chunks, micro_batches), model=chunks,
        num_microbatches=len(micro_batches), seq_length=length, micro_batch_size=size, forward_only=forward_only)
    return [report["loss"] for report in reports]


def _replayed(chunk: DistributedDataParallel, recording: Recording,
              micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """`_scheduled` by a recording."""
    engine = get_model_config(chunk)
    reports = [recording.run(_tensors(batch)) for batch in micro_batches]
    if engine.finalize_model_grads_func is not None:
        tokens = sum(report[1] for report in reports).to(torch.int) if engine.calculate_per_token_loss else None
        engine.finalize_model_grads_func([chunk], tokens)
    return reports


def _one_micro_batch(chunk: DistributedDataParallel, micro_batches: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """Forward and backward of one of a step's micro-batches by the engine's schedule; nothing is finished."""
    meet_peers()
    engine = get_model_config(chunk)
    size, length = inputs["tokens"].shape
    finish, engine.finalize_model_grads_func = engine.finalize_model_grads_func, None
    try:
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, share=1 / micro_batches), data_iterator=iter([inputs]),
            model=[chunk], num_microbatches=1, seq_length=length, micro_batch_size=size, forward_only=False)
    finally:
        engine.finalize_model_grads_func = finish
    return reports[0]["loss"]


def _iterators(chunks: Chunks, micro_batches: Sequence[MicroBatch]) -> Any:
    """Each chunk of an interleaved pipeline walks through the micro-batches by itself."""
    device = torch.device(torch.cuda.current_device())
    walks = [(_on_device(batch, device) for batch in micro_batches) for _ in chunks]
    return walks[0] if len(chunks) == 1 else walks


def _forward_step(batches: Iterator[Mapping[str, Tensor]], model: torch.nn.Module,
                  share: float = 1.0) -> tuple[Tensor, Callable]:
    """The next batch's losses. `share` scales a mean over its tokens, where the schedule does not know the count."""
    batch = next(batches)
    per_token = get_model_config(model).calculate_per_token_loss
    losses = model(batch["tokens"], position_ids=None, attention_mask=None, labels=batch["labels"])
    return losses, partial(_loss, batch["loss_mask"], per_token, 1.0 if per_token else share)


def _on_device(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in _tensors(batch).items()}
    if parallel_state.get_context_parallel_world_size() > 1:
        tensors = get_batch_on_this_cp_rank(tensors)
    return tensors


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(getattr(batch, name)) for name in ("tokens", "labels", "loss_mask")}


def _loss(loss_mask: Tensor, per_token: bool, share: float, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
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
    return summed * share, tokens.to(torch.int), {"loss": report}


def _mean_of(report: Tensor) -> Tensor:
    """[sum, tokens] of a micro-batch as the one term it adds to a mean over micro-batches."""
    return torch.stack([report[0] / report[1].clamp(min=1), torch.ones_like(report[1])])
