"""The gated MLP as one function: what the backward pass can remake is not kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.gate import Gate, gate_for
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear, project, ready_weight
from megatron.pretrain.model.fused.products import weight_gradient


class GatedMLP(MLP):
    """residual + W2 (silu(Wg x) * Wu x) (Shazeer 2020, arXiv:2002.05202), with W1 = [Wg; Wu] on each rank."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
                         ffn_hidden_size=config.ffn_hidden_size)
        self.gate = gate_for(kernels_for(self.linear_fc1.weight.device, config.params_dtype))
        self.recompute = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules

    def forward(self, normed: Tensor, residual: Tensor) -> Tensor:
        """normed and residual [s, b, h] (a shard of s with sequence parallelism) -> [s, b, h]."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _GatedMLP.apply(normed, residual, ready_weight(self.linear_fc1), ready_weight(self.linear_fc2),
                               self.gate, group, self.config.sequence_parallel, self.recompute)


class _GatedMLP(torch.autograd.Function):
    """Keeps the input and the two halves before the activation, and with `recompute` its own input alone."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, residual: Tensor, up: Parameter, down: Parameter, gate: Gate,
                group: dist.ProcessGroup | None, sequence_parallel: bool, recompute: bool) -> Tensor:
        ctx.gate, ctx.group, ctx.sequence_parallel = gate, group, sequence_parallel
        whole = comm.gather(normed, group).wait() if sequence_parallel else normed
        halves, activated = gate.forward(whole.flatten(0, 1), up)
        kept = comm.to_keep(normed, whole, group) if sequence_parallel and not recompute else normed
        ctx.save_for_backward(kept, up, down, None if recompute else halves)
        return project(activated.view(*whole.shape[:2], -1), down, residual, group, sequence_parallel,
                       gate.add_product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, up, down, halves = ctx.saved_tensors
        gate, group, shards = ctx.gate, ctx.group, ctx.sequence_parallel
        d_output = (comm.gather(gradient, group).wait() if shards else gradient.contiguous()).flatten(0, 1)
        gathered = comm.again(kept, gradient.size(0) * (group.size() if shards else 1), group)
        if halves is None:
            halves, _ = gate.forward(gathered.wait().flatten(0, 1), up)
        d_halves, activated = gate.backward(d_output, down, halves)
        d_down = weight_gradient(down, d_output, activated)
        del activated, halves
        whole = gathered.wait()
        reduced = comm.reduce_gradient(gate.input_gradient(d_halves, up).view(whole.shape), group, shards)
        d_up = gate.weight_gradient(up, d_halves, whole.flatten(0, 1))
        return reduced.wait(), gradient, d_up, d_down, None, None, None, None
