"""The fp8 kernels in Triton: a tile is read once, computed in fp32, and written both ways round.

They are bound by memory. The tiles were the fastest of ten measured on an H200: 2.4 to 3.8 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.pretrain.model.fused.quantize_reference import LARGEST_SCALE, Target

TILE = {"HEIGHT": 64, "WIDTH": 64, "num_warps": 4}
FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def plain(values: Tensor, target: Target) -> None:
    rows, columns = values.shape
    _cast_plain[_grid(rows, columns)](values, rows, columns, **_arguments(target), **TILE)


def normed(hidden: Tensor, weight: Tensor, inverse_rms: Tensor, target: Target) -> None:
    rows, columns = hidden.shape
    _cast_normed[_grid(rows, columns)](hidden, weight, inverse_rms, rows, columns, **_arguments(target),
                                       **TILE)


def gated(halves: Tensor, target: Target) -> None:
    rows, columns = halves.size(0), halves.size(1) // 2
    _cast_gated[_grid(rows, columns)](halves, rows, columns, **_arguments(target), **TILE)


def gated_gradient(halves: Tensor, gradient: Tensor, target: Target, activated: Tensor | None,
                   activated_inverse: Tensor | None) -> None:
    rows, columns = gradient.shape
    _cast_gated_gradient[_grid(rows, columns)](
        halves, gradient, rows, columns, activated, activated_inverse, **_arguments(target), ACTIVATED=tl.float8e4nv,
        ACTIVATED_LARGEST=torch.finfo(torch.float8_e4m3fn).max, **{**TILE, "num_warps": 8})


def inverse_rms(hidden: Tensor, eps: float, out: Tensor) -> None:
    rows, columns = hidden.shape
    _inverse_rms[(rows,)](hidden, out, columns, eps, WIDTH=triton.next_power_of_2(columns))


def scale_of(amax: Tensor, largest: float, scale: Tensor, inverse: Tensor) -> None:
    _scale_of[(1,)](amax, scale, inverse, LARGEST=largest, LARGEST_SCALE=LARGEST_SCALE)


def transpose(data: Tensor, out: Tensor) -> None:
    rows, columns = data.shape
    _transpose[_grid(rows, columns)](data.view(torch.uint8), out.view(torch.uint8), rows, columns, **TILE)


def _grid(rows: int, columns: int) -> tuple[int]:
    """A program a tile, along the rows: programs that run together read and write neighbouring lines."""
    return (triton.cdiv(rows, TILE["HEIGHT"]) * triton.cdiv(columns, TILE["WIDTH"]),)


def _arguments(target: Target) -> dict[str, object]:
    written = target.data is not None
    dtype = target.data.dtype if written else torch.float8_e4m3fn
    return {
        "amax": None if target.amax is None else target.amax.view(torch.int32), "scale": target.scale,
        "data": target.data, "transposed": target.transposed, "FORMAT": FORMATS[dtype],
        "LARGEST": torch.finfo(dtype).max, "PTX": written and target.data.is_cuda}


@triton.jit
def _cast_plain(values, rows, columns, amax, scale, data, transposed, FORMAT: tl.constexpr,
                LARGEST: tl.constexpr, PTX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column = _place(columns, HEIGHT, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = _load(values, row, column, inside, columns)
    if amax is not None:
        _raise(amax, value)
    if data is not None:
        _write(value, scale, data, transposed, row, column, row < rows, column < columns, rows, columns,
               FORMAT, LARGEST, PTX)


@triton.jit
def _cast_normed(hidden, weight, inverse_rms, rows, columns, amax, scale, data, transposed,
                 FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr):
    row, column = _place(columns, HEIGHT, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)
    gain = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    value = _load(hidden, row, column, inside, columns) * inverse[:, None] * gain[None, :]
    if amax is not None:
        _raise(amax, value)
    if data is not None:
        _write(value, scale, data, transposed, row, column, row < rows, column < columns, rows, columns,
               FORMAT, LARGEST, PTX)


@triton.jit
def _cast_gated(halves, rows, columns, amax, scale, data, transposed, FORMAT: tl.constexpr,
                LARGEST: tl.constexpr, PTX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column = _place(columns, HEIGHT, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gate = _load(halves, row, column, inside, 2 * columns)
    up = _load(halves + columns, row, column, inside, 2 * columns)
    value = gate * tl.sigmoid(gate) * up
    if amax is not None:
        _raise(amax, value)
    if data is not None:
        _write(value, scale, data, transposed, row, column, row < rows, column < columns, rows, columns,
               FORMAT, LARGEST, PTX)


@triton.jit
def _cast_gated_gradient(halves, gradient, rows, columns, activated, activated_inverse, amax, scale, data, transposed,
                         FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr, HEIGHT: tl.constexpr,
                         WIDTH: tl.constexpr, ACTIVATED: tl.constexpr, ACTIVATED_LARGEST: tl.constexpr):
    """`columns` are those of one half. With silu(g) = g s(g): silu'(g) = s (1 + g (1 - s))."""
    row, column = _place(columns, HEIGHT, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gate = _load(halves, row, column, inside, 2 * columns)
    up = _load(halves + columns, row, column, inside, 2 * columns)
    upstream = _load(gradient, row, column, inside, columns)
    sigmoid = tl.sigmoid(gate)
    d_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = upstream * gate * sigmoid
    if amax is not None:
        _raise(amax, tl.maximum(tl.abs(d_gate), tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL))
    if data is not None:
        _write(d_gate, scale, data, transposed, row, column, row < rows, column < columns, rows, 2 * columns,
               FORMAT, LARGEST, PTX)
        _write(d_up, scale, data, transposed, row, column + columns, row < rows, column < columns, rows,
               2 * columns, FORMAT, LARGEST, PTX)
    if activated is not None:
        again = _quantized(gate * sigmoid * up * (1 / tl.load(activated_inverse)), ACTIVATED, ACTIVATED_LARGEST, PTX)
        _store_transposed(tl.trans(again), activated, row, column, row < rows, column < columns, rows)


@triton.jit
def _inverse_rms(hidden, out, columns, eps, WIDTH: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    value = tl.load(hidden + row.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
    value = value.to(tl.float32)
    tl.store(out + row, 1 / tl.sqrt(tl.sum(value * value) / columns + eps))


@triton.jit
def _scale_of(amax, scale, inverse, LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr):
    seen = tl.load(amax)
    # Comparisons with NaN are false: it passes through both.
    wanted = tl.where(seen == 0, 1.0, LARGEST / seen)
    wanted = tl.where(wanted > LARGEST_SCALE, LARGEST_SCALE, wanted)
    tl.store(scale, wanted)
    tl.store(inverse, 1 / wanted)


@triton.jit
def _transpose(data, out, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column = _place(columns, HEIGHT, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(data + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside)
    _store_transposed(tl.trans(tile), out, row, column, row < rows, column < columns, rows)


@triton.jit
def _place(columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The rows and columns of this program's tile."""
    across = tl.cdiv(columns, WIDTH)
    tile = tl.program_id(0)
    return (tile // across) * HEIGHT + tl.arange(0, HEIGHT), (tile % across) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _load(values, row, column, inside, stride):
    return tl.load(values + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32)


@triton.jit
def _raise(amax, value):
    """Without their sign, floats are ordered as their bits are as integers, with NaN above infinity.

    Tiles that do not raise it leave it alone: thousands of atomics on one address would queue. What is read here
    may be out of date, and is then too low: the atomic decides.
    """
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if largest > tl.load(amax):
        tl.atomic_max(amax, largest)


@triton.jit
def _write(value, scale, data, transposed, row, column, row_inside, column_inside, rows, columns,
           FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr):
    quantized = _quantized(value * tl.load(scale), FORMAT, LARGEST, PTX)
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(data + row.to(tl.int64)[:, None] * columns + column[None, :], quantized, mask=inside)
    if transposed is not None:
        _store_transposed(tl.trans(quantized), transposed, row, column, row_inside, column_inside, rows)


@triton.jit
def _quantized(scaled, FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr):
    held = tl.where(tl.abs(scaled) < float("inf"), tl.clamp(scaled, -LARGEST, LARGEST), float("nan"))
    return _four_at_once(held, FORMAT) if PTX else held.to(FORMAT)


@triton.jit
def _four_at_once(value, FORMAT: tl.constexpr):
    """To fp8 by instructions of our own, four numbers in one 32-bit register.

    Triton's conversion leaves pairs in 16-bit registers, which are stored together and transposed apart. The
    ptxas of CUDA 12.8, which Triton 3.6 carries, merges the pairs and then reads one of them from a register
    that nothing has written: the transpose of the gate's half was wrong.
    """
    if FORMAT == tl.float8e5:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [value], dtype=tl.int8, is_pure=True, pack=4)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [value], dtype=tl.int8, is_pure=True, pack=4)
    return bits.to(FORMAT, bitcast=True)


@triton.jit
def _store_transposed(tile, out, row, column, row_inside, column_inside, rows):
    inside = column_inside[:, None] & row_inside[None, :]
    tl.store(out + column.to(tl.int64)[:, None] * rows + row[None, :], tile, mask=inside)
