"""Tensor-parallel linear layers in fp8: operands are cast once and serve two products each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.fp8_products import add_product, input_gradient, product, weight_gradient
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear
from megatron.pretrain.model.fused.quantize import Quantized, Source
from megatron.pretrain.model.fused.scaling import Scaling


class Casts:
    """How a linear layer's three tensors are cast, and its weight as it was cast for this step."""

    def __init__(self, weight: Parameter, *, weight_scaling: Scaling, inputs: Scaling,
                 gradient: Scaling) -> None:
        self.inputs, self.gradient = inputs, gradient
        self._weight, self._scaling = weight, weight_scaling
        self._cast: Quantized | None = None

    def weight(self) -> Quantized:
        """Cast at the first use after `forget`; all passes of a step's micro-batches share it."""
        if self._cast is None:
            self._cast = self._scaling.quantize(Source(self._weight.detach()))
        return self._cast

    def forget(self) -> None:
        """The parameter has changed, or may have."""
        self._cast = None


class Fp8ColumnLinear(ColumnLinear):
    """`ColumnLinear` in fp8; `casts` is given once the model is on its device."""

    casts: Casts

    def _forward_impl(self, input: Tensor, weight: Parameter, *, allreduce_dgrad: bool,  # noqa: A002
                      sequence_parallel: bool, tp_group: dist.ProcessGroup | None, **_: object) -> Tensor:
        group = tp_group if allreduce_dgrad or sequence_parallel else None
        return _Column.apply(input, weight, self.casts, group, sequence_parallel)


class Fp8RowLinear(RowLinear):
    """`RowLinear` in fp8; `casts` is given once the model is on its device."""

    casts: Casts

    def forward(self, inputs: Tensor, residual: Tensor) -> Tensor:
        """inputs [s, b, in / ranks], residual [s, b, out] (with sequence parallelism a shard of s) -> its like."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _Row.apply(inputs, residual, self.weight, self.casts, group, self.sequence_parallel)


class _Column(torch.autograd.Function):
    """Keeps the gathered input's fp8 transpose: for two ranks as much as a bf16 shard; no second gather."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Parameter, casts: Casts, group: dist.ProcessGroup | None,
                sequence_parallel: bool) -> Tensor:
        whole = comm.gather(inputs, group).wait() if sequence_parallel else inputs
        cast = casts.inputs.quantize(rows_of(whole))
        ctx.save_for_backward(weight, *kept(cast))
        ctx.casts, ctx.group, ctx.sequence_parallel = casts, group, sequence_parallel
        return product(cast, casts.weight(), inputs.dtype).view(*whole.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        cast = ctx.casts.gradient.quantize(rows_of(gradient))
        partial = input_gradient(cast, ctx.casts.weight(), gradient.dtype).view(*gradient.shape[:2], -1)
        reduced = comm.reduce_gradient(partial, ctx.group, ctx.sequence_parallel)
        d_weight = weight_gradient(weight, cast, restored(*inputs))
        return reduced.wait(), d_weight, None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, residual: Tensor, weight: Parameter, casts: Casts,
                group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
        cast = casts.inputs.quantize(rows_of(inputs))
        ctx.save_for_backward(weight, *kept(cast))
        ctx.casts, ctx.group, ctx.sequence_parallel = casts, group, sequence_parallel
        return project(cast, casts.weight(), residual, group, sequence_parallel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        whole = comm.gather(gradient, ctx.group).wait() if ctx.sequence_parallel else gradient
        cast = ctx.casts.gradient.quantize(rows_of(whole))
        d_inputs = input_gradient(cast, ctx.casts.weight(), gradient.dtype).view(*whole.shape[:2], -1)
        d_weight = weight_gradient(weight, cast, restored(*inputs))
        return d_inputs, gradient, d_weight, None, None, None


def project(inputs: Quantized, weight: Quantized, residual: Tensor, group: dist.ProcessGroup | None,
            sequence_parallel: bool) -> Tensor:
    """residual + inputs @ weight^T, summed over the group's ranks; residual [s, b, out] or a shard of s."""
    if group is None:
        return add_product(residual.flatten(0, 1), inputs, weight).view(residual.shape)
    shards = group.size() if sequence_parallel else 1
    partial = product(inputs, weight, residual.dtype).view(residual.size(0) * shards, *residual.shape[1:])
    summed = comm.scatter_sum(partial, group) if sequence_parallel else comm.total(partial, group)
    return summed.wait().add_(residual)


def rows_of(values: Tensor) -> Source:
    """[s, b, features] as the rows that are cast."""
    return Source(values.flatten(0, 1).contiguous())


def kept(cast: Quantized) -> tuple[Tensor, Tensor]:
    """What a weight's gradient needs of its layer's input."""
    return cast.transposed, cast.inverse


def restored(transposed: Tensor, inverse: Tensor) -> Quantized:
    """What was `kept`, for the products that read only the transpose."""
    return Quantized(transposed.new_empty(0), transposed, inverse)
