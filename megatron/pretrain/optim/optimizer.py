"""megatron-core's AdamW (plain, mixed-precision or distributed), and one step of it that skips what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron.pretrain.config import RunConfig
from megatron.pretrain.optim.adamw import FusedAdamW, replace_kernel
from megatron.pretrain.optim.sharded import mend_loading, parts


@dataclass(frozen=True)
class StepOutcome:
    """What became of one optimizer step."""

    updated: bool
    grad_norm: float


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over the chunks' parameters; weight decay on matrices alone (norms have one axis)."""
    optim, train, layout = config.optim, config.train, config.layout
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=optim.lr, min_lr=optim.min_lr, weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1, adam_beta2=optim.adam_beta2, adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad, bf16=train.bf16,
            params_dtype=torch.bfloat16 if train.bf16 else torch.float32,
            use_distributed_optimizer=layout.use_distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather),
        chunks)
    mend_loading(optimizer)
    for part in parts(optimizer):
        replace_kernel(part)
    return optimizer


def apply_schedule(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group the learning rate and its share of the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def step(optimizer: MegatronOptimizer, clip_grad: float) -> StepOutcome:
    """Clip to the global norm and update, unless a gradient is not finite: then nothing changes.

    The norm is taken over every rank, so all ranks decide alike.
    """
    optimizer.prepare_grads()
    grad_norm = global_grad_norm(optimizer)
    if not math.isfinite(grad_norm):
        return StepOutcome(updated=False, grad_norm=grad_norm)
    for part in parts(optimizer):
        _clip(part, clip_grad, grad_norm)
    return StepOutcome(updated=optimizer.step_with_ready_grads(), grad_norm=grad_norm)


def global_grad_norm(optimizer: MegatronOptimizer) -> float:
    """The 2-norm of all gradients over every rank that holds a part of them, with one read of the device."""
    squares = []
    for part in parts(optimizer):
        grads = _grads_for_norm(part)
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        square = norm.float().square().to(torch.cuda.current_device())
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        squares.append(square)
    return math.sqrt(float(torch.stack(squares).sum()))


def _grads_for_norm(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients that this rank answers for; megatron-core 0.19 has renamed the method."""
    renamed = getattr(part, "get_grads_for_grad_norm", None)
    return renamed() if renamed else part.get_main_grads_for_grad_norm()


def _clip(part: MegatronOptimizer, clip_grad: float, grad_norm: float) -> None:
    """Scale the gradients so that their global norm is at most `clip_grad`; 0 leaves them."""
    if isinstance(part.optimizer, FusedAdamW):
        # The engine's coefficient, so that a run's losses do not depend on who clips.
        part.optimizer.gradient_divisor = max(1.0, (grad_norm + 1e-6) / clip_grad) if clip_grad > 0 else 1.0
        return
    parameters = part.get_parameters()
    if clip_grad > 0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
