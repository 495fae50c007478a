"""The fp8 kernels in Triton: a tile is read once, computed in fp32, and written both ways round.

They are bound by memory as long as they spend few instructions on a number, so they are written by those: fp8 numbers
are made four at a time, as the 32-bit words they are stored in. Words along a row are a row's neighbours. Words
along a column are too, where a thread holds four rows, which `_rows` sees to: then nothing smaller than a word is ever
moved between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.pretrain.model.fused.quantize_reference import LARGEST_SCALE, Target

TILE = {"HEIGHT": 64, "WIDTH": 64, "num_warps": 4}
TRANSPOSE_TILE = {"HEIGHT": 128, "WIDTH": 64, "num_warps": 4}
FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def plain(values: Tensor, target: Target) -> None:
    rows, columns = values.shape
    _cast_plain[_grid(rows, columns, TILE)](values, rows, columns, **_arguments(target, rows, columns))


def normed(hidden: Tensor, weight: Tensor, inverse_rms: Tensor, target: Target) -> None:
    rows, columns = hidden.shape
    _cast_normed[_grid(rows, columns, TILE)](hidden, weight, inverse_rms, rows, columns,
                                             **_arguments(target, rows, columns))


def gated(halves: Tensor, target: Target) -> None:
    rows, columns = halves.size(0), halves.size(1) // 2
    _cast_gated[_grid(rows, columns, TILE)](halves, rows, columns, **_arguments(target, rows, columns))


def gated_gradient(halves: Tensor, gradient: Tensor, target: Target, activated: Tensor | None,
                   activated_inverse: Tensor | None) -> None:
    rows, columns = gradient.shape
    _require_words(columns)    # the second half of a line begins with one, too
    words = None if activated is None else _words_of(activated)
    _cast_gated_gradient[_grid(rows, columns, TILE)](
        halves, gradient, rows, columns, words, activated_inverse, **_arguments(target, rows, columns),
        ACTIVATED=tl.float8e4nv)


def inverse_rms(hidden: Tensor, eps: float, out: Tensor) -> None:
    rows, columns = hidden.shape
    _inverse_rms[(rows,)](hidden, out, columns, eps, WIDTH=triton.next_power_of_2(columns))


def scale_of(amax: Tensor, largest: float, scale: Tensor, inverse: Tensor) -> None:
    _scale_of[(1,)](amax, scale, inverse, LARGEST=largest, LARGEST_SCALE=LARGEST_SCALE)


def transpose(data: Tensor, out: Tensor) -> None:
    rows, columns = data.shape
    _transpose[_grid(rows, columns, TRANSPOSE_TILE)](data.view(torch.uint8), _words_of(out), rows, columns,
                                                     EVEN=_even(rows, columns, TRANSPOSE_TILE), **TRANSPOSE_TILE)


def _grid(rows: int, columns: int, tile: dict[str, int]) -> tuple[int]:
    """A program a tile, along the rows: programs that run together read and write neighbouring lines."""
    return (triton.cdiv(rows, tile["HEIGHT"]) * triton.cdiv(columns, tile["WIDTH"]),)


def _even(rows: int, columns: int, tile: dict[str, int]) -> bool:
    """Whether tiles cover the matrix with nothing over, so that no number needs to be looked at for its place."""
    return rows % tile["HEIGHT"] == 0 and columns % tile["WIDTH"] == 0


def _words_of(matrix: Tensor) -> Tensor:
    """An fp8 matrix as the words it is written in. ValueError where its lines do not end with one."""
    _require_words(matrix.size(1))
    return matrix.view(torch.int32)


def _require_words(length: int) -> None:
    if length % 4:
        raise ValueError(f"fp8 kernels write lines of a multiple of 4 numbers, not {length}")


def _arguments(target: Target, rows: int, columns: int) -> dict[str, object]:
    return {
        "amax": None if target.amax is None else target.amax.view(torch.int32), "scale": target.scale,
        "data": None if target.data is None else _words_of(target.data),
        "transposed": None if target.transposed is None else _words_of(target.transposed),
        "FORMAT": tl.float8e4nv if target.scale is None else FORMATS[target.dtype],
        "PTX": (target.amax if target.scale is None else target.scale).is_cuda,
        "EVEN": _even(rows, columns, TILE), **TILE}


@triton.jit
def _cast_plain(values, rows, columns, amax, scale, data, transposed, FORMAT: tl.constexpr, PTX: tl.constexpr,
                EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    top, left = _corner(columns, HEIGHT, WIDTH)
    value = _load(values, top, left, rows, columns, columns, PTX, EVEN, HEIGHT, WIDTH)
    if amax is not None:
        _raise(amax, value)
    if scale is not None:
        _write(value, scale, data, transposed, top, left, rows, columns, columns, FORMAT, PTX, EVEN, HEIGHT, WIDTH)


@triton.jit
def _cast_normed(hidden, weight, inverse_rms, rows, columns, amax, scale, data, transposed, FORMAT: tl.constexpr,
                 PTX: tl.constexpr, EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    top, left = _corner(columns, HEIGHT, WIDTH)
    row, column = top + _rows(HEIGHT), left + tl.arange(0, WIDTH)
    inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)
    gain = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    value = _load(hidden, top, left, rows, columns, columns, PTX, EVEN, HEIGHT, WIDTH)
    value = value * inverse[:, None] * gain[None, :]
    if amax is not None:
        _raise(amax, value)
    if scale is not None:
        _write(value, scale, data, transposed, top, left, rows, columns, columns, FORMAT, PTX, EVEN, HEIGHT, WIDTH)


@triton.jit
def _cast_gated(halves, rows, columns, amax, scale, data, transposed, FORMAT: tl.constexpr, PTX: tl.constexpr,
                EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    top, left = _corner(columns, HEIGHT, WIDTH)
    gate = _load(halves, top, left, rows, columns, 2 * columns, PTX, EVEN, HEIGHT, WIDTH)
    up = _load(halves + columns, top, left, rows, columns, 2 * columns, PTX, EVEN, HEIGHT, WIDTH)
    value = gate * _sigmoid(gate, PTX) * up
    if amax is not None:
        _raise(amax, value)
    if scale is not None:
        _write(value, scale, data, transposed, top, left, rows, columns, columns, FORMAT, PTX, EVEN, HEIGHT, WIDTH)


@triton.jit
def _cast_gated_gradient(halves, gradient, rows, columns, activated, activated_inverse, amax, scale, data, transposed,
                         FORMAT: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr, HEIGHT: tl.constexpr,
                         WIDTH: tl.constexpr, ACTIVATED: tl.constexpr):
    """`columns` are those of one half. With silu(g) = g s(g): silu'(g) = s + silu (1 - s).

    The activation comes first: what it needs then is not in registers while the gradients are.
    """
    top, left = _corner(columns, HEIGHT, WIDTH)
    gate = _load(halves, top, left, rows, columns, 2 * columns, PTX, EVEN, HEIGHT, WIDTH)
    up = _load(halves + columns, top, left, rows, columns, 2 * columns, PTX, EVEN, HEIGHT, WIDTH)
    upstream = _load(gradient, top, left, rows, columns, columns, PTX, EVEN, HEIGHT, WIDTH)
    sigmoid = _sigmoid(gate, PTX)
    silu = gate * sigmoid
    if activated is not None:
        again = _scaled(silu * up, 1 / tl.load(activated_inverse))
        _write_transposed(again, activated, top, left, rows, columns, ACTIVATED, PTX, EVEN, HEIGHT, WIDTH)
    d_gate = upstream * up * (sigmoid + silu * (1 - sigmoid))
    d_up = upstream * silu
    if amax is not None:
        _raise(amax, tl.maximum(tl.abs(d_gate), tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL))
    if scale is not None:
        beside = None if data is None else data + columns // 4
        below = None if transposed is None else transposed + columns.to(tl.int64) * (rows // 4)
        _write(d_gate, scale, data, transposed, top, left, rows, columns, 2 * columns, FORMAT, PTX, EVEN, HEIGHT,
               WIDTH)
        _write(d_up, scale, beside, below, top, left, rows, columns, 2 * columns, FORMAT, PTX, EVEN,
               HEIGHT, WIDTH)


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
def _transpose(data, out, rows, columns, EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    top, left = _corner(columns, HEIGHT, WIDTH)
    tile = _read(data, top, left, rows, columns, columns, EVEN, HEIGHT, WIDTH).to(tl.int32)
    first, second, third, fourth = _apart(_fours_of_rows(tile, HEIGHT, WIDTH))
    word = first | second << 8 | third << 16 | fourth << 24
    _store_transposed(word, out, top, left, rows, columns, EVEN, HEIGHT, WIDTH)


@triton.jit
def _corner(columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The first row and column of this program's tile."""
    across = tl.cdiv(columns, WIDTH)
    tile = tl.program_id(0)
    return tile // across * HEIGHT, tile % across * WIDTH


@triton.jit
def _rows(HEIGHT: tl.constexpr):
    """The rows of a tile in the order in which it is held: every fourth, then those after them.

    A thread is given every HEIGHT / 4-th of what is held, and has four neighbours of a column in its registers.
    """
    held = tl.arange(0, HEIGHT)
    return held % (HEIGHT // 4) * 4 + held // (HEIGHT // 4)


@triton.jit
def _read(values, top, left, rows, columns, stride, EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [HEIGHT, WIDTH] of a matrix whose rows are `stride` numbers apart; 0 beyond its edges."""
    row, column = _rows(HEIGHT), tl.arange(0, WIDTH)
    # Within a tile 32 bits are enough, and cheaper.
    place = values + top.to(tl.int64) * stride + left + (row[:, None] * stride + column[None, :])
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=(top + row < rows)[:, None] & (left + column < columns)[None, :], other=0)


@triton.jit
def _load(values, top, left, rows, columns, stride, PTX: tl.constexpr, EVEN: tl.constexpr, HEIGHT: tl.constexpr,
          WIDTH: tl.constexpr):
    """`_read` in fp32."""
    value = _read(values, top, left, rows, columns, stride, EVEN, HEIGHT, WIDTH)
    if PTX and value.dtype == tl.bfloat16:
        # Two at once, an instruction each; the compiler's own way takes three.
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value],
                                         dtype=tl.float32, is_pure=True, pack=2)
    return value.to(tl.float32)


@triton.jit
def _sigmoid(value, PTX: tl.constexpr):
    """1 / (1 + e^-value), to two units of fp32's last place; Triton's own costs four times as many instructions."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e;"    # - log2 e
            " add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1)
    return tl.sigmoid(value)


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
def _write(value, scale, data, transposed, top, left, rows, columns, stride, FORMAT: tl.constexpr, PTX: tl.constexpr,
           EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile, times the scale, to data and to transposed where wanted, with rows `stride` and `rows` numbers apart."""
    scaled = _scaled(value, tl.load(scale))
    if data is not None:
        word = _word(_apart(tl.reshape(scaled, (HEIGHT, WIDTH // 4, 2, 2))), FORMAT, PTX)
        row, column = _rows(HEIGHT), tl.arange(0, WIDTH // 4)
        place = data + (top.to(tl.int64) * stride + left) // 4 + (row[:, None] * (stride // 4) + column[None, :])
        if EVEN:
            tl.store(place, word)
        else:
            tl.store(place, word, mask=(top + row < rows)[:, None] & (left + 4 * column < columns)[None, :])
    if transposed is not None:
        _write_transposed(scaled, transposed, top, left, rows, columns, FORMAT, PTX, EVEN, HEIGHT, WIDTH)


@triton.jit
def _scaled(value, scale):
    """value * scale, with NaN for an infinity: infinity x 0 is NaN, what is finite adds 0."""
    scaled = value * scale
    return tl.fma(scaled, 0.0, scaled)


@triton.jit
def _write_transposed(scaled, out, top, left, rows, columns, FORMAT: tl.constexpr, PTX: tl.constexpr,
                      EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    word = _word(_apart(_fours_of_rows(scaled, HEIGHT, WIDTH)), FORMAT, PTX)
    _store_transposed(word, out, top, left, rows, columns, EVEN, HEIGHT, WIDTH)


@triton.jit
def _store_transposed(word, out, top, left, rows, columns, EVEN: tl.constexpr, HEIGHT: tl.constexpr,
                      WIDTH: tl.constexpr):
    """word [HEIGHT / 4, WIDTH], each of four rows, to out, whose lines are the matrix's columns."""
    fours, column = tl.arange(0, HEIGHT // 4), tl.arange(0, WIDTH)
    place = out + left.to(tl.int64) * (rows // 4) + top // 4 + (column[:, None] * (rows // 4) + fours[None, :])
    if EVEN:
        tl.store(place, tl.trans(word))
    else:
        tl.store(place, tl.trans(word), mask=(left + column < columns)[:, None] & (top + 4 * fours < rows)[None, :])


@triton.jit
def _fours_of_rows(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """[HEIGHT, WIDTH], held as `_rows` says -> [HEIGHT / 4, WIDTH, 2, 2]: four neighbours of a column last."""
    return tl.permute(tl.reshape(tile, (2, 2, HEIGHT // 4, WIDTH)), (2, 3, 0, 1))


@triton.jit
def _apart(fours):
    """[..., 2, 2] -> its four parts, in order."""
    even, odd = tl.split(fours)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _word(parts, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Four numbers to the nearest in fp8, held within its finite numbers, the first in the lowest byte.

    The instructions are not pure to the compiler, which would otherwise move the numbers in place of the words.
    """
    first, second, third, fourth = parts
    if not PTX:
        low, high = _byte(first, FORMAT) | _byte(second, FORMAT) << 8, _byte(third, FORMAT) | _byte(fourth, FORMAT) << 8
        return low | high << 16
    if FORMAT == tl.float8e5:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [first, second, third, fourth], dtype=tl.int32, is_pure=False, pack=1)
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r", [first, second, third, fourth], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _byte(value, FORMAT: tl.constexpr):
    """One number in fp8, in the lowest of 32 bits, by Triton's own conversion, which does not hold it."""
    LARGEST: tl.constexpr = 57344.0 if FORMAT == tl.float8e5 else 448.0
    held = tl.where(value == value, tl.clamp(value, -LARGEST, LARGEST), value)
    return held.to(FORMAT).to(tl.uint8, bitcast=True).to(tl.int32)
