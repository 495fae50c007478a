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
    Casts, Fp8ColumnLinear, Fp8RowLinear, cast_and_multiply, kept, normed, normed_again, normed_columns, project,
    reduced_gradient, restored, rows_of)
from megatron.pretrain.model.fused.fp8_products import input_gradient, product, weight_gradient
from megatron.pretrain.model.fused.norm import FusedRMSNorm, norm_gradients
from megatron.pretrain.model.fused.quantize import E4M3, Gated, GatedGradient, Normed, Quantized
from megatron.pretrain.model.fused.weights import ready_weight


class Fp8GatedMLP(MLP):
    """residual + W2 (silu(Wg x) * Wu x) as `mlp.GatedMLP`, with W1 = [Wg; Wu] on each rank."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=Fp8ColumnLinear, linear_fc2=Fp8RowLinear),
                         ffn_hidden_size=config.ffn_hidden_size)
        self.recompute = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules

    def forward(self, hidden: Tensor, norm: FusedRMSNorm) -> Tensor:
        """hidden [s, b, h] (a shard of s with sequence parallelism) -> its like."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _Fp8GatedMLP.apply(
            hidden, *(ready_weight(part) for part in (norm, self.linear_fc1, self.linear_fc2)), norm,
            self.linear_fc1.casts, self.linear_fc2.casts, group, self.config.sequence_parallel, self.recompute)


class _Fp8GatedMLP(torch.autograd.Function):
    """hidden + the MLP of its norm.

    Keeps the hidden state, and the halves, from which the cast of their gradient remakes the activation; of a norm that
    was gathered, the cast's transpose. With `recompute` the hidden state alone.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Parameter, up: Parameter, down: Parameter, norm: FusedRMSNorm,
                up_casts: Casts, down_casts: Casts, group: dist.ProcessGroup | None, sequence_parallel: bool,
                recompute: bool) -> Tensor:
        ctx.casts, ctx.group, ctx.sequence_parallel = (up_casts, down_casts), group, sequence_parallel
        ctx.kernel = norm.kernel
        source, gathered = normed(hidden, gain, norm.eps), group is not None and sequence_parallel
        inputs, halves = _halves(ctx, source, hidden, up, columns=gathered and not recompute)
        activated = down_casts.inputs.quantize(Gated(halves.flatten(0, 1)), columns=False)
        ctx.save_for_backward(hidden, gain, source.inverse_rms, up, down, activated.inverse,
                              *(() if recompute else (halves, *(kept(inputs) if gathered else ()))))
        return project(activated, down_casts.weight(), hidden, group, sequence_parallel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gain, inverse_rms, up, down, activated_inverse, *saved = ctx.saved_tensors
        up_casts, down_casts = ctx.casts
        if saved:
            halves, *cast = saved
            inputs = restored(*cast) if cast else None
        else:
            inputs, halves = _halves(ctx, normed_again(hidden, gain, inverse_rms), hidden, up, columns=True)
        d_output, d_activated = cast_and_multiply(
            rows_of(gradient), gradient, down_casts.gradient, ctx.group if ctx.sequence_parallel else None,
            down.size(1), partial(input_gradient, down_casts.weight()))
        activated = torch.empty(down.size(1), d_activated.numel() // down.size(1), dtype=E4M3, device=hidden.device)
        d_halves = up_casts.gradient.quantize(
            GatedGradient(halves.flatten(0, 1), d_activated.flatten(0, 1), activated, activated_inverse))
        del saved, halves
        reduced = reduced_gradient(d_halves, up_casts.weight(), d_activated, ctx.group, ctx.sequence_parallel)
        del d_activated
        d_down = weight_gradient(down, d_output, restored(activated, activated_inverse))
        del activated, d_output
        if inputs is None:
            inputs = normed_columns(hidden, gain, inverse_rms, up_casts.inputs)
        d_up = weight_gradient(up, d_halves, inputs)
        d_hidden, d_gain = norm_gradients(hidden, reduced.wait(), gradient, gain, inverse_rms, ctx.kernel)
        return d_hidden, d_gain, d_up, d_down, None, None, None, None, None, None


def _halves(ctx: Any, source: Normed, hidden: Tensor, up: Parameter, *, columns: bool) -> tuple[Quantized, Tensor]:
    """As `cast_and_multiply` of the norm of hidden [s, b, h]: what it becomes before the activation [s, b, 2 f]."""
    casts, _ = ctx.casts
    return cast_and_multiply(source, hidden, casts.inputs, ctx.group if ctx.sequence_parallel else None, up.size(0),
                             partial(product, casts.weight()), columns=columns)
