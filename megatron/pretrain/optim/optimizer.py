"""megatron-core's AdamW (plain, mixed-precision or distributed), and one step of it that skips what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron.pretrain.config import RunConfig
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
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return StepOutcome(updated=False, grad_norm=grad_norm)
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    return StepOutcome(updated=optimizer.step_with_ready_grads(), grad_norm=grad_norm)
