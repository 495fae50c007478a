"""The gated MLP in fp8: the activation and its gradient exist in fp8 alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused.fp8_linear import (
    Casts, Fp8ColumnLinear, Fp8RowLinear, cast_and_multiply, kept, project, reduced_gradient, restored)
from megatron.pretrain.model.fused.fp8_products import input_gradient, product, weight_gradient
from megatron.pretrain.model.fused.linear import ready_weight
from megatron.pretrain.model.fused.quantize import Gated, GatedGradient


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
        inputs, halves = cast_and_multiply(normed, up_casts.inputs, group if sequence_parallel else None,
                                           up.size(0), partial(product, up_casts.weight()))
        activated = down_casts.inputs.quantize(Gated(halves.flatten(0, 1)))
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
            halves = gradient.new_empty(rest[0].size(0), up.size(0))
            product(up_casts.weight(), rest[0], inverse, halves)
            activated = down_casts.inputs.quantize(Gated(halves))
        else:
            halves, activated = rest[0].flatten(0, 1), restored(*rest[1:])
        d_output, d_activated = cast_and_multiply(
            gradient, down_casts.gradient, ctx.group if ctx.sequence_parallel else None, down.size(1),
            partial(input_gradient, down_casts.weight()))
        d_down = weight_gradient(down, d_output, activated)
        d_halves = up_casts.gradient.quantize(GatedGradient(halves, d_activated.flatten(0, 1)))
        del rest, halves, activated
        reduced = reduced_gradient(d_halves, up_casts.weight(), d_activated, ctx.group, ctx.sequence_parallel)
        del d_activated
        d_up = weight_gradient(up, d_halves, inputs)
        return reduced.wait(), gradient, d_up, d_down, None, None, None, None, None
