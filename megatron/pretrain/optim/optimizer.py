"""megatron-core's AdamW (plain, mixed-precision or distributed), and one step of it that skips what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.pretrain.config import RunConfig


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
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            _mend_loading(part)
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
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    return StepOutcome(updated=optimizer.step_with_ready_grads(), grad_norm=grad_norm)


def prime_for_loading(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW empty moments, which the engine's loading copies into but does not create."""
    for parameter, state in _torch_states(optimizer):
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter),
                         exp_avg_sq=torch.zeros_like(parameter))


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a `step` of its own.

    The engine loads one tensor into all of them; AdamW adds to it in place, so that one optimizer step would
    count as many.
    """
    for _, state in _torch_states(optimizer):
        state["step"] = state["step"].clone()


def _mend_loading(optimizer: DistributedOptimizer) -> None:
    """Let a distributed optimizer on torch's AdamW load its state.

    megatron-core 0.16.1 copies into every entry of AdamW's state, `step` among them, which the checkpoint
    keeps elsewhere: it fails with a KeyError. `step` has been set by then, so it is copied onto itself.
    """
    load_one = DistributedOptimizer._set_main_param_and_optimizer_states

    def load_with_step(self: DistributedOptimizer, model_param: torch.nn.Parameter,
                       tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        with torch.no_grad():
            load_one(self, model_param, {**tensors, "step": state["step"].clone()})

    optimizer._set_main_param_and_optimizer_states = MethodType(load_with_step, optimizer)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each parameter that torch's AdamW updates, with its state; nothing where the optimizer is another's."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, part.optimizer.state[parameter]
