"""Tensor-parallel linear layers in fp8: what is cast serves two products, or is made again where that is cheap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import communication as comm
from megatron.pretrain.model.fused.fp8_products import add_product, input_gradient, product, weight_gradient
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear
from megatron.pretrain.model.fused.norm import FusedRMSNorm, norm_gradients
from megatron.pretrain.model.fused.quantize import Normed, Quantized, Source, inverse_rms, transpose
from megatron.pretrain.model.fused.scaling import Scaling
from megatron.pretrain.model.fused.weights import ready_weight


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

    def after(self, norm: FusedRMSNorm, hidden: Tensor) -> tuple[Tensor, Tensor]:
        group = self.tp_group if self.tp_group.size() > 1 else None
        return _NormedColumn.apply(hidden, ready_weight(norm), ready_weight(self), norm, self.casts, group,
                                   self.sequence_parallel)

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
    """Keeps the whole input's fp8 transpose: for two ranks as much as a bf16 shard; no second gather."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Parameter, casts: Casts, group: dist.ProcessGroup | None,
                sequence_parallel: bool) -> Tensor:
        cast, out = cast_and_multiply(rows_of(inputs), inputs, casts.inputs, group if sequence_parallel else None,
                                      weight.size(0), partial(product, casts.weight()))
        ctx.save_for_backward(weight, *kept(cast))
        ctx.casts, ctx.group, ctx.sequence_parallel = casts, group, sequence_parallel
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        return *_column_gradients(ctx, gradient, weight, lambda: restored(*inputs)), None, None, None


class _NormedColumn(torch.autograd.Function):
    """`_Column` of a norm whose output exists in fp8 alone. Returns the norm's input too, as the residual.

    Keeps that input, from which the cast is made again; where it was gathered, the cast's transpose.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Parameter, weight: Parameter, norm: FusedRMSNorm, casts: Casts,
                group: dist.ProcessGroup | None, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
        source, gathered_by = normed(hidden, gain, norm.eps), group if sequence_parallel else None
        cast, out = cast_and_multiply(source, hidden, casts.inputs, gathered_by, weight.size(0),
                                      partial(product, casts.weight()), columns=gathered_by is not None)
        ctx.save_for_backward(hidden, gain, source.inverse_rms, weight, *(kept(cast) if gathered_by else ()))
        ctx.kernel, ctx.casts, ctx.group, ctx.sequence_parallel = norm.kernel, casts, group, sequence_parallel
        ctx.set_materialize_grads(False)
        return out, hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, d_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, gain, inverse_rms, weight, *cast = ctx.saved_tensors
        d_normed, d_weight = _column_gradients(
            ctx, gradient, weight,
            lambda: restored(*cast) if cast else normed_columns(hidden, gain, inverse_rms, ctx.casts.inputs))
        d_hidden, d_gain = norm_gradients(hidden, d_normed, d_residual, gain, inverse_rms, ctx.kernel)
        return d_hidden, d_gain, d_weight, None, None, None, None


def _column_gradients(ctx: Any, gradient: Tensor, weight: Parameter,
                      inputs: Callable[[], Quantized]) -> tuple[Tensor, Tensor]:
    """Of a column-parallel layer's inputs and weight."""
    cast = ctx.casts.gradient.quantize(rows_of(gradient))
    reduced = reduced_gradient(cast, ctx.casts.weight(), gradient, ctx.group, ctx.sequence_parallel)
    d_weight = weight_gradient(weight, cast, inputs())
    return reduced.wait(), d_weight


class _Row(torch.autograd.Function):
    """Keeps its input, which attention keeps too, and makes the cast again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, residual: Tensor, weight: Parameter, casts: Casts,
                group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
        cast = casts.inputs.quantize(rows_of(inputs), columns=False)
        ctx.save_for_backward(inputs, weight)
        ctx.casts, ctx.group, ctx.sequence_parallel = casts, group, sequence_parallel
        return project(cast, casts.weight(), residual, group, sequence_parallel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        cast, d_inputs = cast_and_multiply(
            rows_of(gradient), gradient, ctx.casts.gradient, ctx.group if ctx.sequence_parallel else None,
            weight.size(1), partial(input_gradient, ctx.casts.weight()))
        d_weight = weight_gradient(weight, cast, ctx.casts.inputs.quantize(rows_of(inputs), rows=False))
        return d_inputs, gradient, d_weight, None, None, None


def cast_and_multiply(source: Source, values: Tensor, scaling: Scaling, group: dist.ProcessGroup | None, width: int,
                      multiply: Callable[[Tensor, Tensor, Tensor], None], *,
                      columns: bool = True) -> tuple[Quantized, Tensor]:
    """Cast the rows of values [s, b, features], with a group each rank its shard of s, and multiply the whole.

    multiply(rows, inverse, out) is given fp8 [tokens, features] x inverse and out [tokens, width]. What travels
    is fp8. Returns what a weight's gradient needs of the whole cast, its `columns`, and the product [s, b, width].
    """
    cast = scaling.quantize(source, group, columns=columns)
    length = values.size(0) * (group.size() if group else 1)
    out = values.new_empty(length, values.size(1), width)
    if group is None:
        multiply(cast.data, cast.inverse, out.flatten(0, 1))
        return restored(*kept(cast)), out
    whole = comm.gather_into(
        cast.data.view(torch.uint8).view(values.shape), group,
        lambda rows, place: multiply(rows.flatten(0, 1).view(cast.data.dtype), cast.inverse,
                                     out[place].flatten(0, 1)))
    data = whole.flatten(0, 1).view(cast.data.dtype)
    return restored(transpose(data) if columns else None, cast.inverse), out


def reduced_gradient(gradient: Quantized, weight: Quantized, like: Tensor, group: dist.ProcessGroup | None,
                     sequence_parallel: bool) -> comm.Pending:
    """The input's gradient of a column-parallel layer, whose output's gradient was cast from like [s, b, out]."""
    rows = gradient.data.view(*like.shape[:2], -1)
    return comm.summed(
        lambda place, out: input_gradient(weight, rows[place].flatten(0, 1), gradient.inverse, out.flatten(0, 1)),
        (*like.shape[:2], weight.data.size(1)), like, group, sequence_parallel)


def project(inputs: Quantized, weight: Quantized, residual: Tensor, group: dist.ProcessGroup | None,
            sequence_parallel: bool) -> Tensor:
    """residual + inputs @ weight^T, summed over the group's ranks; residual [s, b, out] or a shard of s."""
    if group is None:
        return add_product(residual.flatten(0, 1), inputs, weight).view(residual.shape)
    length = residual.size(0) * (group.size() if sequence_parallel else 1)
    rows = inputs.data.view(length, residual.size(1), -1)

    def produce(place: slice, out: Tensor) -> None:
        product(weight, rows[place].flatten(0, 1), inputs.inverse, out.flatten(0, 1))

    shape = (length, *residual.shape[1:])
    return comm.summed(produce, shape, residual, group, sequence_parallel).wait().add_(residual)


def rows_of(values: Tensor) -> Source:
    """[s, b, features] as the rows that are cast."""
    return Source(values.flatten(0, 1).contiguous())


def normed(hidden: Tensor, gain: Parameter, eps: float) -> Normed:
    """The RMSNorm of hidden [s, b, features] as the rows that are cast."""
    rows = hidden.flatten(0, 1).contiguous()
    return Normed(rows, gain.detach(), inverse_rms(rows, eps))


def normed_columns(hidden: Tensor, gain: Parameter, inverse_rms: Tensor, scaling: Scaling) -> Quantized:
    """The columns of a cast of `normed`, whose inverse_rms [tokens] is known."""
    return scaling.quantize(normed_again(hidden, gain, inverse_rms), rows=False)


def normed_again(hidden: Tensor, gain: Parameter, inverse_rms: Tensor) -> Normed:
    """As `normed`, which had to find the inverse_rms [tokens]."""
    return Normed(hidden.flatten(0, 1).contiguous(), gain.detach(), inverse_rms)


def kept(cast: Quantized) -> tuple[Tensor | None, Tensor]:
    """What a weight's gradient needs of a cast."""
    return cast.transposed, cast.inverse


def restored(transposed: Tensor | None, inverse: Tensor) -> Quantized:
    """What was `kept`."""
    return Quantized(None, transposed, inverse)
