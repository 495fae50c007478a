"""The gated MLP as one function: what the backward pass can remake is not kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.config import FusedConfig
from megatron.pretrain.model.fused.gate import Gate, gate_for
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear, project
from megatron.pretrain.model.fused.norm import FusedRMSNorm
from megatron.pretrain.model.fused.products import weight_gradient
from megatron.pretrain.model.fused.weights import ready_weight


class GatedMLP(MLP):
    """residual + W2 (silu(Wg x) * Wu x) (Shazeer 2020, arXiv:2002.05202), with W1 = [Wg; Wu] on each rank."""

    def __init__(self, config: FusedConfig, **_: object) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
                         ffn_hidden_size=config.ffn_hidden_size)
        self.gate = gate_for(kernels_for(self.linear_fc1.weight.device, config.params_dtype),
                             collectives_beside=config.collectives_beside_products)
        self.recompute = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules

    def forward(self, hidden: Tensor, norm: FusedRMSNorm) -> Tensor:
        """hidden [s, b, h] (a shard of s with sequence parallelism) -> its like."""
        normed, residual = norm.branch(hidden)
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _GatedMLP.apply(normed, residual, ready_weight(self.linear_fc1), ready_weight(self.linear_fc2),
                               self.gate, group, self.config.sequence_parallel, self.recompute)


class _GatedMLP(torch.autograd.Function):
    """Keeps the input and the two halves before the activation, and with `recompute` its own input alone."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, residual: Tensor, up: Parameter, down: Parameter, gate: Gate,
                group: dist.ProcessGroup | None, sequence_parallel: bool, recompute: bool) -> Tensor:
        ctx.gate, ctx.group, ctx.sequence_parallel = gate, group, sequence_parallel
        gathering = group if sequence_parallel else None
        whole, halves, activated = _activate(normed, up, gate, gathering)
        kept = normed if recompute else comm.to_keep(normed, whole, gathering)
        ctx.save_for_backward(kept, up, down, None if recompute else halves)
        return project(activated, down, residual, group, sequence_parallel, gate.add_product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, up, down, halves = ctx.saved_tensors
        gate, group, shards = ctx.gate, ctx.group, ctx.sequence_parallel
        gathering = group if shards else None
        if halves is None:
            whole, halves, activated = _activate(kept, up, gate, gathering)
            gathered = comm.ready(whole)
        else:
            gathered = comm.again(kept, halves.size(0), gathering)
            activated = halves.new_empty(*halves.shape[:2], down.size(1))
        d_halves = torch.empty_like(halves)
        d_output = comm.gather_into(gradient, gathering, lambda rows, place: gate.backward(
            rows.flatten(0, 1), down, *(part[place].flatten(0, 1) for part in (halves, d_halves, activated))))
        d_down = weight_gradient(down, d_output.flatten(0, 1), activated.flatten(0, 1))
        del activated, halves
        reduced = comm.summed(
            lambda place, out: gate.input_gradient(d_halves[place].flatten(0, 1), up, out.flatten(0, 1)),
            d_output.shape, d_output, group, shards)
        d_up = gate.weight_gradient(up, d_halves.flatten(0, 1), gathered.wait().flatten(0, 1))
        return reduced.wait(), gradient, d_up, d_down, None, None, None, None


def _activate(normed: Tensor, up: Parameter, gate: Gate,
              gathering: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """normed [s, b, h], or a shard of s for each of a group's ranks -> (whole, halves [s, b, 2 f], activated)."""
    length = normed.size(0) * (gathering.size() if gathering else 1)
    halves = normed.new_empty(length, normed.size(1), up.size(0))
    activated = normed.new_empty(length, normed.size(1), up.size(0) // 2)
    whole = comm.gather_into(normed, gathering, lambda rows, place: gate.forward(
        rows.flatten(0, 1), up, halves[place].flatten(0, 1), activated[place].flatten(0, 1)))
    return whole, halves, activated
