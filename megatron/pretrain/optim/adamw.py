"""AdamW for a GPU in one pass: each number is read once and written once, the gradient's scale included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, state and all, with a Triton kernel for contiguous fp32 parameters on a GPU.

    torch's own fused kernel writes the scaled gradient back and reached three quarters of the memory's speed on
    an H200; this one moves 28 bytes a parameter, and 2 for the 16-bit weight that the model computes with.
    """

    gradient_divisor: float = 1.0
    """Gradients are divided by this as they are read: clipping without a pass of its own."""
    model_weights: Mapping[Tensor, Tensor] = MappingProxyType({})
    """Of parameters that are fp32 masters, the model's contiguous 16-bit weights, which the update writes too."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update (Loshchilov & Hutter 2019, arXiv:1711.05101) of every parameter that has a gradient."""
        from megatron.pretrain.optim.triton_adamw import update_

        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    state["step"] += 1
                    update_(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"],
                            self.model_weights.get(parameter), **coefficients(group, float(state["step"])),
                            divisor=self.gradient_divisor)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            # The step is counted on the host: bias correction needs it there, and nothing waits for it.
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter),
                         exp_avg_sq=torch.zeros_like(parameter))
        return state


def coefficients(group: dict[str, Any], step: float) -> dict[str, float]:
    """What the update needs of a parameter group at its step-th update, with torch's bias correction."""
    beta1, beta2 = group["betas"]
    return {"beta1": beta1, "beta2": beta2, "epsilon": group["eps"],
            "decay": 1 - group["lr"] * group["weight_decay"], "rate": group["lr"] / (1 - beta1 ** step),
            "second_scale": 1 / math.sqrt(1 - beta2 ** step)}


def replace_kernel(part: MegatronOptimizer) -> None:
    """Give torch's AdamW our kernel, if every parameter is fp32 on a GPU.

    The object stays: in fp32 the distributed optimizer's parameters are views, which a new one would refuse.
    """
    optimizer = part.optimizer
    if type(optimizer) is not torch.optim.AdamW:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if parameters and all(parameter.is_cuda and parameter.dtype == torch.float32 and parameter.is_contiguous()
                          for parameter in parameters):
        take_over(part)


def take_over(part: MegatronOptimizer) -> None:
    """Let the kernel do an engine's optimizer's update, and its copy of masters into the model's weights."""
    part.optimizer.__class__ = FusedAdamW
    pairs = dict(_masters_and_weights(part))
    if pairs:
        part.optimizer.model_weights = pairs
        # Called right after the update, and from nowhere else.
        part._copy_main_params_to_model_params = lambda: None


def _masters_and_weights(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each fp32 master that an engine's optimizer updates, with the 16-bit weight, or this rank's part of it."""
    if isinstance(part, DistributedOptimizer):
        for masters, weights in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                place = part._get_model_param_range_map(weight)["gbuf_world_in_bucket"]
                buffer, _, bucket = part.model_param_gbuf_map[weight]
                data = part.buffers[buffer].buckets[bucket].param_data
                yield master, data.view(-1)[place.start:place.end]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for masters, weights in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            yield from zip(masters, (weight.data for weight in weights), strict=True)
