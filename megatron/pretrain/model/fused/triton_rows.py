"""Rows that are summed in fp32 straight into an accumulator: all of them, or each token's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ALL = {"ROWS": 64, "COLUMNS": 32}
OF_A_TOKEN = {"ROWS": 16, "COLUMNS": 512}


def add_all(total: Tensor, rows: Tensor) -> None:
    """total[h] += the sum of rows [n, h], both fp32, in one order."""
    count, width = rows.shape
    rows_add_all[(triton.cdiv(width, ALL["COLUMNS"]),)](total, rows, count, width, **ALL)


def add_by_token(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """total[tokens[i]] += rows[i] for total fp32 [vocabulary, h], tokens [n], contiguous rows [n, h], in one order.

    Tokens that are no row of total are passed over.
    """
    ordered, order = tokens.int().sort(stable=True)
    count, width = rows.shape
    rows_add_by_token[(count, triton.cdiv(width, OF_A_TOKEN["COLUMNS"]))](
        total, ordered, order, rows, total.size(0), count, width, **OF_A_TOKEN)


@triton.jit
def rows_add_all(total, rows, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        summed += tl.sum(tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0), 0)
    at = total + column
    tl.store(at, tl.load(at, mask=column < width, other=0.0) + summed, mask=column < width)


@triton.jit
def rows_add_by_token(total, ordered, order, rows, vocabulary, count, width, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr):
    """The program at the first of a token's places adds all of its rows, ROWS at a time; those at others add none."""
    place = tl.program_id(0)
    token = tl.load(ordered + place)
    before = tl.load(ordered + place - 1, mask=place > 0, other=-1)
    if (token >= 0) & (token < vocabulary) & (token != before):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        summed = tl.zeros((COLUMNS,), tl.float32)
        more = place < count
        while more:
            places = place + tl.arange(0, ROWS)
            same = tl.load(ordered + places, mask=places < count, other=-1) == token
            row = tl.load(order + places, mask=same, other=0)
            inside = same[:, None] & (column < width)[None, :]
            summed += tl.sum(tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(
                tl.float32), 0)
            place += ROWS
            more = tl.load(ordered + place, mask=place < count, other=-1) == token
        at = total + token.to(tl.int64) * width + column
        tl.store(at, tl.load(at, mask=column < width, other=0.0) + summed, mask=column < width)
