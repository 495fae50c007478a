"""AdamW for a GPU in one pass: each number is read once and written once, the gradient's scale included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, state and all, with a Triton kernel for contiguous fp32 parameters on a GPU.

    torch's own fused kernel writes the scaled gradient back and reached three quarters of the memory's speed on
    an H200; this one moves 28 bytes a parameter.
    """

    gradient_divisor: float = 1.0
    """Gradients are divided by this as they are read: clipping without a pass of its own."""

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
                            **coefficients(group, float(state["step"])), divisor=self.gradient_divisor)

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


def replace_kernel(optimizer: torch.optim.Optimizer) -> None:
    """Give torch's AdamW our kernel, if every parameter is fp32 on a GPU.

    The object stays: in fp32 the distributed optimizer's parameters are views, which a new one would refuse.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if type(optimizer) is torch.optim.AdamW and parameters and all(
            parameter.is_cuda and parameter.dtype == torch.float32 and parameter.is_contiguous()
            for parameter in parameters):
        optimizer.__class__ = FusedAdamW
