"""Rotary position embedding on packed query, key and value heads: in place, or on the way into the packing.

Packed are heads [s, b, groups, queries + 2, d]: of each group its queries, its key and its value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS_A_PROGRAM = 16
STRIP_HEADS_A_PROGRAM = 4
STRIP_ROWS, TILE_ROWS = 16, 64
"""Of one of Hopper's matrix products, a warp's and four warps'."""


def rotate_(mixed: Tensor, angles: Tensor, *, inverse: bool = False, keys_only: bool = False) -> None:
    """Rotate the query and key heads of mixed [s, b, groups, queries + 2, d] by angles [s, 1, 1, d], in place.

    Feature i turns with feature i + d / 2 by angles[..., i] (Su et al. 2021, arXiv:2104.09864, in the half-split
    order of Llama), computed in fp32. `inverse` turns back: the gradient's way. mixed is contiguous, angles fp32.
    """
    length, batch, groups, heads, width = mixed.shape
    first, each = (heads - 2, 1) if keys_only else (0, heads - 1)
    grid = (length * batch, triton.cdiv(groups * each, HEADS_A_PROGRAM))
    rope_rotate[grid](mixed, angles, batch, groups, first, each, heads, width, -1.0 if inverse else 1.0,
                      HALF=width // 2, BLOCK_HALF=triton.next_power_of_2(width // 2),
                      BLOCK_HEADS=HEADS_A_PROGRAM)


def pack_rotated_back(query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, angles: Tensor) -> None:
    """Turn gradients back by angles [s, 1, 1, d] and pack them into mixed [s, b, groups, queries + 2, d].

    query [b, s, heads, d], key and value [b, s, groups, d], each with a contiguous last axis: one pass for what
    would be three copies and a rotation in place. A value stays as it is.
    """
    length, batch, groups, heads, width = mixed.shape
    grid = (length * batch, triton.cdiv(groups * heads, HEADS_A_PROGRAM))
    rope_pack[grid](query, key, value, mixed, angles, batch, groups * heads, heads, width,
                    *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                    HALF=width // 2, BLOCK_HALF=triton.next_power_of_2(width // 2), BLOCK_HEADS=HEADS_A_PROGRAM)


def pack_sums(sums: Tensor, mixed: Tensor, slot: int, scale: float, angles: Tensor | None = None) -> None:
    """Pack sums times `scale`, turned back by angles [s, 1, 1, d] where there are, from `slot` of each group on.

    sums [b, heads, tiles * 64 * d] fp32, d a multiple of 16: each tile 64 rows, in the order in which the threads of
    Hopper's products have a result (PTX ISA, "Register fragments and shared memory matrix layout" of wgmma, the
    accumulator of m64nNk16), four values of a thread side by side: [d / 8, warp of 16 rows, row mod 8, pair of
    columns, row div 8, column of the pair].
    """
    length, batch, groups, heads, width = mixed.shape
    all_heads = sums.size(1)
    grid = (batch * triton.cdiv(length, STRIP_ROWS), triton.cdiv(all_heads, STRIP_HEADS_A_PROGRAM))
    rope_pack_sums[grid](sums, mixed, angles, scale, batch, length, all_heads, all_heads // groups, slot, heads,
                         sums.size(2), WIDTH=width, EIGHTS=triton.next_power_of_2(width // 16), ROWS=STRIP_ROWS,
                         STRIPS=TILE_ROWS // STRIP_ROWS, HEADS=STRIP_HEADS_A_PROGRAM)


@triton.jit
def rope_rotate(mixed, angles, batch, groups, first_slot, each, heads, width, sign,
                HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """One token's next BLOCK_HEADS heads, counted over all groups' slots from the first on, so many of each."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK_HALF)
    angle = tl.load(angles + (token // batch) * width + feature, mask=feature < HALF, other=0.0)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :] * sign

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    start = ((token * groups + head // each) * heads + first_slot + head % each) * width
    mask = (head < groups * each)[:, None] & (feature < HALF)[None, :]
    first_at = mixed + start[:, None] + feature[None, :]
    second_at = first_at + HALF
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cosine - second * sine).to(mixed.dtype.element_ty), mask=mask)
    tl.store(second_at, (second * cosine + first * sine).to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def rope_pack(query, key, value, mixed, angles, batch, all_heads, heads, width, query_batch, query_row, query_head,
              key_batch, key_row, key_head, value_batch, value_row, value_head,
              HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """One token's next BLOCK_HEADS heads in the packing's order."""
    token = tl.program_id(0).to(tl.int64)
    row, sample = token // batch, token % batch
    feature = tl.arange(0, BLOCK_HALF)
    angle = tl.load(angles + row * width + feature, mask=feature < HALF, other=0.0)

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    group, slot = head // heads, head % heads
    is_key, is_value = slot == heads - 2, slot == heads - 1
    source = tl.where(
        is_value, value + sample * value_batch + row * value_row + group * value_head,
        tl.where(is_key, key + sample * key_batch + row * key_row + group * key_head,
                 query + sample * query_batch + row * query_row + (group * (heads - 2) + slot) * query_head))
    cosine = tl.where(is_value[:, None], 1.0, tl.cos(angle)[None, :])
    sine = tl.where(is_value[:, None], 0.0, -tl.sin(angle)[None, :])
    mask = (head < all_heads)[:, None] & (feature < HALF)[None, :]
    first_at = source[:, None] + feature[None, :]
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_at + HALF, mask=mask, other=0.0).to(tl.float32)
    out = mixed + (token * all_heads + head)[:, None] * width + feature[None, :]
    tl.store(out, (first * cosine - second * sine).to(mixed.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cosine + first * sine).to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def rope_pack_sums(sums, mixed, angles, scale, batch, length, all_heads, each, first_slot, heads, sums_of_head,
                   WIDTH: tl.constexpr, EIGHTS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr,
                   HEADS: tl.constexpr):
    """A strip of ROWS, of which a tile has STRIPS, of the next HEADS heads.

    EIGHTS are of a half of the features, a power of 2: the last may not be there.
    """
    HALF: tl.constexpr = WIDTH // 2
    sample = (tl.program_id(0) % batch).to(tl.int64)
    strip = (tl.program_id(0) // batch).to(tl.int64)
    row = strip * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, 8 * EIGHTS)
    mask = (row < length)[:, None] & (feature < HALF)[None, :]
    if angles is not None:
        angle = tl.load(angles + row[:, None] * WIDTH + feature[None, :], mask=mask, other=0.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)

    # Eight columns of a tile lie one strip after the other.
    eighth = tl.arange(0, EIGHTS)[:, None]
    there = eighth < HALF // 8
    of_strip = (sums + strip // STRIPS * STRIPS * ROWS * WIDTH + strip % STRIPS * 8 * ROWS
                + eighth * 8 * ROWS * STRIPS + tl.arange(0, 8 * ROWS)[None, :])
    begin = tl.program_id(1) * HEADS
    for head in range(begin, tl.minimum(begin + HEADS, all_heads)):
        at = of_strip + (sample * all_heads + head) * sums_of_head
        first = _rows(tl.load(at, mask=there, other=0.0), EIGHTS) * scale
        second = _rows(tl.load(at + HALF * ROWS * STRIPS, mask=there, other=0.0), EIGHTS) * scale
        if angles is not None:
            first, second = first * cosine + second * sine, second * cosine - first * sine
        start = ((row * batch + sample) * (all_heads // each) + head // each) * heads + first_slot + head % each
        out = mixed + start[:, None] * WIDTH + feature[None, :]
        tl.store(out, first.to(mixed.dtype.element_ty), mask=mask)
        tl.store(out + HALF, second.to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def _rows(values, EIGHTS: tl.constexpr):
    """A warp's part of a product's result, [columns / 8, row mod 8 x pair x row div 8 x 2] -> [16, columns]."""
    values = tl.reshape(values, (EIGHTS, 8, 4, 2, 2))
    return tl.reshape(tl.permute(values, (3, 1, 0, 2, 4)), (16, 8 * EIGHTS))
