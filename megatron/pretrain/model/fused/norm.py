"""RMSNorm whose backward pass adds the residual's gradient in the same kernel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.products import deliver_sum
from megatron.pretrain.model.fused.weights import ready_weight
from megatron.pretrain.model.layers import RMSNorm


class FusedRMSNorm(RMSNorm):
    """The local layers' norm with faster kernels, and with the residual branch as a second output."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        device = self.weight.device if config.use_cpu_initialization else torch.device("cuda")
        self.kernel = kernels_for(device, config.params_dtype).norm

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return self.branch(hidden)[0]

    def branch(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of hidden, hidden): taking the residual from here joins both gradients in one kernel."""
        return _RMSNorm.apply(hidden, ready_weight(self), self.eps, self.kernel)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Parameter, eps: float, kernel: str) -> tuple[Tensor, Tensor]:
        normed, inverse_rms = (_quack_forward if kernel == "quack" else _torch_forward)(
            hidden.flatten(0, -2), weight, eps)
        ctx.save_for_backward(hidden, weight, inverse_rms)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        return normed.view(hidden.shape), hidden

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor, d_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse_rms = ctx.saved_tensors
        return *norm_gradients(hidden, d_normed, d_residual, weight, inverse_rms, ctx.kernel), None, None


def norm_gradients(hidden: Tensor, d_normed: Tensor, d_residual: Tensor | None, weight: Parameter,
                   inverse_rms: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The gradient of hidden [..., h], the residual's added to it, and the weight's as autograd takes it."""
    rows = [None if part is None else part.flatten(0, -2).contiguous()
            for part in (hidden, d_normed, d_residual)]
    d_hidden, parts = (_quack_backward if kernel == "quack" else _torch_backward)(*rows, weight, inverse_rms)
    return d_hidden.view(hidden.shape), deliver_sum(weight, parts)


def _torch_forward(hidden: Tensor, weight: Parameter, eps: float) -> tuple[Tensor, Tensor]:
    """hidden [tokens, h] -> (normed, 1 / rms in fp32 [tokens])."""
    inverse_rms = torch.rsqrt(hidden.float().square().mean(-1) + eps)
    return (hidden.float() * inverse_rms[:, None] * weight.float()).to(hidden.dtype), inverse_rms


def _torch_backward(hidden: Tensor, d_normed: Tensor, d_residual: Tensor | None, weight: Parameter,
                    inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """With y = w * x / rms(x): dx = (w dy - x^ mean(w dy x^)) / rms + d_residual, where x^ = x / rms(x).

    The weight's gradient is the sum of the second result, fp32 [parts, h].
    """
    unit = hidden.float() * inverse_rms[:, None]
    scaled = d_normed.float() * weight.float()
    d_hidden = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse_rms[:, None]
    if d_residual is not None:
        d_hidden += d_residual
    return d_hidden.to(hidden.dtype), (d_normed.float() * unit).sum(0, keepdim=True)


def _quack_forward(hidden: Tensor, weight: Parameter, eps: float) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import rmsnorm_fwd

    normed, _, inverse_rms = rmsnorm_fwd(hidden, weight.detach(), eps=eps, store_rstd=True)
    return normed, inverse_rms


def _quack_backward(hidden: Tensor, d_normed: Tensor, d_residual: Tensor | None, weight: Parameter,
                    inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """As `_torch_backward`, a part of each program's: quack's own `rmsnorm_bwd` rounds their sum to bf16."""
    from quack.rmsnorm import _rmsnorm_bwd, get_sm_count

    d_hidden = torch.empty_like(hidden)
    programs = get_sm_count(hidden.size(1), hidden.device)
    parts = torch.empty(programs, hidden.size(1), dtype=torch.float32, device=hidden.device)
    _rmsnorm_bwd(hidden, weight.detach(), d_normed, inverse_rms, d_hidden, parts, None, d_residual, None, programs)
    return d_hidden, parts
