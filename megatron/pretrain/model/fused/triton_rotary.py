"""Rotary position embedding on packed query, key and value heads: in place, or on the way into the packing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS_A_PROGRAM = 16


def rotate_(mixed: Tensor, angles: Tensor, *, inverse: bool = False) -> None:
    """Rotate the query and key heads of mixed [s, b, groups, queries + 2, d] by angles [s, 1, 1, d], in place.

    A group holds its query heads, its key head and its value head, which stays. Feature i turns with feature
    i + d / 2 by angles[..., i] (Su et al. 2021, arXiv:2104.09864, in the half-split order of Llama), computed
    in fp32. `inverse` turns back: the gradient's way. mixed is contiguous, angles fp32.
    """
    length, batch, groups, heads, width = mixed.shape
    grid = (length * batch, triton.cdiv(groups * (heads - 1), HEADS_A_PROGRAM))
    rope_rotate[grid](mixed, angles, batch, groups * (heads - 1), heads, width, -1.0 if inverse else 1.0,
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


@triton.jit
def rope_rotate(mixed, angles, batch, rotated_heads, heads, width, sign,
                HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """One token's next BLOCK_HEADS query and key heads, counted over all groups without the value heads."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK_HALF)
    angle = tl.load(angles + (token // batch) * width + feature, mask=feature < HALF, other=0.0)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :] * sign

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    group = head // (heads - 1)
    groups = rotated_heads // (heads - 1)
    # A value head stands between one group's key and the next group's queries.
    start = (token * groups * heads + head + group) * width
    mask = (head < rotated_heads)[:, None] & (feature < HALF)[None, :]
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
