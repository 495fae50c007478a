"""Tensor-parallel linear layers whose weight gradients go straight into the fp32 accumulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.gate import gate_for
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.norm import FusedRMSNorm
from megatron.pretrain.model.fused.products import multiply, weight_gradient

AddProduct = Callable[[Tensor, Parameter, Tensor, Tensor], None]


class Linear(torch.autograd.Function):
    """inputs [s, b, in] x weight [out, in] -> [s, b, out], with the collectives of a column-parallel layer.

    With `sequence_parallel` the inputs are a shard of the sequence: they are gathered beside the product, and
    where they are not kept (`communication.to_keep`) again in the backward pass. The input's gradient is reduced
    beside the weight's.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Parameter, group: dist.ProcessGroup | None,
                sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        gathering = group if sequence_parallel else None
        length = inputs.size(0) * (gathering.size() if gathering else 1)
        out = inputs.new_empty(length, inputs.size(1), weight.size(0))
        whole = comm.gather_into(inputs, gathering, lambda rows, place: product(rows, weight.t(), out[place]))
        ctx.save_for_backward(comm.to_keep(inputs, whole, gathering), weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        gathered = comm.again(inputs, gradient.size(0), ctx.group)
        gradient = gradient.contiguous()
        reduced = comm.summed(lambda place, out: product(gradient[place], weight, out),
                              (*gradient.shape[:2], weight.size(1)), gradient, ctx.group, ctx.sequence_parallel)
        weighed = weight_gradient(weight, gradient.flatten(0, 1), gathered.wait().flatten(0, 1))
        return reduced.wait(), weighed, None, None


def product(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [s, b, n], contiguous, = rows [s, b, k] @ weight [k, n]."""
    multiply(rows.flatten(0, 1), weight, out.view(-1, out.size(-1)))


def linear(*, input: Tensor, weight: Parameter, allreduce_dgrad: bool, sequence_parallel: bool,  # noqa: A002
           tp_group: dist.ProcessGroup | None, **_: object) -> Tensor:
    """`Linear` under the engine's names: what its layers call for their product."""
    group = tp_group if allreduce_dgrad or sequence_parallel else None
    return Linear.apply(input, weight, group, sequence_parallel)


class ColumnLinear(ColumnParallelLinear):
    """The engine's column-parallel layer with `Linear` as its product."""

    def _forward_impl(self, input: Tensor, weight: Parameter, **kwargs: Any) -> Tensor:  # noqa: A002
        return linear(input=input, weight=weight, **kwargs)

    def after(self, norm: FusedRMSNorm, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [s, b, in] (a shard of s with sequence parallelism) -> (this layer of its norm, the residual)."""
        normed, residual = norm.branch(hidden)
        return self(normed)[0], residual


class RowLinear(RowParallelLinear):
    """The engine's row-parallel layer, which adds to a residual."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_product = gate_for(kernels_for(self.weight.device, self.weight.dtype),
                                    collectives_beside=self.config.collectives_beside_products).add_product

    def forward(self, inputs: Tensor, residual: Tensor) -> Tensor:
        """inputs [s, b, in / ranks], residual [s, b, out] (a shard of s with sequence parallelism) -> as residual."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _RowLinear.apply(inputs, residual, self.weight, group, self.sequence_parallel, self.add_product)


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, residual: Tensor, weight: Parameter, group: dist.ProcessGroup | None,
                sequence_parallel: bool, add_product: AddProduct) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return project(inputs, weight, residual, group, sequence_parallel, add_product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        d_inputs = inputs.new_empty(inputs.shape)  # not empty_like: attention may have left other strides
        whole = comm.gather_into(gradient, ctx.group if ctx.sequence_parallel else None,
                                 lambda rows, place: product(rows, weight, d_inputs[place]))
        d_weight = weight_gradient(weight, whole.flatten(0, 1), inputs.flatten(0, 1))
        return d_inputs, gradient, d_weight, None, None, None


def project(inputs: Tensor, weight: Parameter, residual: Tensor, group: dist.ProcessGroup | None,
            sequence_parallel: bool, add_product: AddProduct) -> Tensor:
    """residual + inputs @ weight^T, summed over the group's ranks: a row-parallel layer outside autograd."""
    if group is None:
        out = residual.new_empty(residual.shape)
        add_product(inputs.flatten(0, 1), weight, residual.flatten(0, 1), out.view(-1, out.size(-1)))
        return out
    summed = comm.summed(lambda place, out: product(inputs[place], weight.t(), out),
                         (*inputs.shape[:2], weight.size(0)), inputs, group, sequence_parallel)
    return summed.wait().add_(residual)
