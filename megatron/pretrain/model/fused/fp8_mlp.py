"""The gated MLP in fp8: the activation and its gradient exist in fp8 alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.fp8_linear import (
    Casts, Fp8ColumnLinear, Fp8RowLinear, kept, project, restored, rows_of)
from megatron.pretrain.model.fused.fp8_products import input_gradient, product, weight_gradient
from megatron.pretrain.model.fused.linear import ready_weight
from megatron.pretrain.model.fused.quantize import Gated, GatedGradient, Quantized


class Fp8GatedMLP(MLP):
    """residual + W2 (silu(Wg x) * Wu x) as `mlp.GatedMLP`, with W1 = [Wg; Wu] on each rank."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=Fp8ColumnLinear, linear_fc2=Fp8RowLinear),
                         ffn_hidden_size=config.ffn_hidden_size)
        self.recompute = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules

    def forward(self, normed: Tensor, residual: Tensor) -> Tensor:
        """normed and residual [s, b, h] (a shard of s with sequence parallelism) -> [s, b, h]."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _Fp8GatedMLP.apply(
            normed, residual, ready_weight(self.linear_fc1), ready_weight(self.linear_fc2),
            self.linear_fc1.casts, self.linear_fc2.casts, group, self.config.sequence_parallel, self.recompute)


class _Fp8GatedMLP(torch.autograd.Function):
    """Keeps input and activation as fp8 transposes, and the halves; with `recompute` the input alone."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, residual: Tensor, up: Parameter, down: Parameter, up_casts: Casts,
                down_casts: Casts, group: dist.ProcessGroup | None, sequence_parallel: bool,
                recompute: bool) -> Tensor:
        whole = comm.gather(normed, group).wait() if sequence_parallel else normed
        inputs = up_casts.inputs.quantize(rows_of(whole))
        halves, activated = _activate(inputs, up_casts, down_casts, normed.dtype)
        ctx.casts, ctx.group, ctx.sequence_parallel = (up_casts, down_casts), group, sequence_parallel
        remade = (inputs.data,) if recompute else (halves, *kept(activated))
        ctx.save_for_backward(up, down, *kept(inputs), *remade)
        return project(activated, down_casts.weight(), residual, group, sequence_parallel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        up, down, transposed, inverse, *rest = ctx.saved_tensors
        up_casts, down_casts = ctx.casts
        inputs = restored(transposed, inverse)
        if len(rest) == 1:
            halves, activated = _activate(Quantized(rest[0], transposed, inverse), up_casts, down_casts,
                                          gradient.dtype)
        else:
            halves, activated = rest[0], restored(*rest[1:])
        whole = comm.gather(gradient, ctx.group).wait() if ctx.sequence_parallel else gradient
        d_output = down_casts.gradient.quantize(rows_of(whole))
        d_activated = input_gradient(d_output, down_casts.weight(), gradient.dtype)
        d_down = weight_gradient(down, d_output, activated)
        d_halves = up_casts.gradient.quantize(GatedGradient(halves, d_activated))
        del rest, halves, activated, d_activated
        partial = input_gradient(d_halves, up_casts.weight(), gradient.dtype).view(whole.shape)
        reduced = comm.reduce_gradient(partial, ctx.group, ctx.sequence_parallel)
        d_up = weight_gradient(up, d_halves, inputs)
        return reduced.wait(), gradient, d_up, d_down, None, None, None, None, None


def _activate(inputs: Quantized, up_casts: Casts, down_casts: Casts,
              dtype: torch.dtype) -> tuple[Tensor, Quantized]:
    """(halves [tokens, 2 f], the activation [tokens, f] cast)."""
    halves = product(inputs, up_casts.weight(), dtype)
    return halves, down_casts.inputs.quantize(Gated(halves))
