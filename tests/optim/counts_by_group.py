"""In apex's place on a CPU: an Adam that counts its updates in the parameter group, as apex's and TE's do."""

from __future__ import annotations

import sys
from types import ModuleType

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def __init__(self, params: object, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, adam_w_mode: bool = True) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        (beta1, beta2), count = group["betas"], group["step"]
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
        mean, square = state["exp_avg"] / (1 - beta1 ** count), state["exp_avg_sq"] / (1 - beta2 ** count)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def stand_in() -> None:
    """To be called before the engine is imported."""
    sys.modules["apex"] = ModuleType("apex")
    sys.modules["apex.optimizers"] = optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedSGD = FusedAdam, torch.optim.SGD
