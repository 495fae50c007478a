"""Pure rules between a tensor of Megatron's layout and tensors of Hugging Face's, in both directions.

A rule says of which rows of which Hugging Face tensors Megatron's tensor consists, one after the other: so
one statement serves both ways. A `cut_*` says where in the whole tensor the parts lie that tensor-parallel
ranks hold of it. Rows and columns are counted here; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron.pretrain.export.shape import ModelShape


@dataclass(frozen=True)
class Part:
    """Rows from `start` to before `stop` of the Hugging Face tensor number `tensor` of a rule."""

    tensor: int
    start: int
    stop: int


Rows = Callable[[int, ModelShape], tuple[Part, ...]]
"""The parts that a Megatron tensor of so many rows consists of; rows beyond them are padding."""


def same(rows: int, shape: ModelShape) -> tuple[Part, ...]:
    """One tensor, as it is."""
    return (Part(0, 0, rows),)


def vocabulary(rows: int, shape: ModelShape) -> tuple[Part, ...]:
    """`[vocabulary, hidden]`, and then the rows that only pad."""
    return (Part(0, 0, shape.vocab_size),)


def grouped_qkv(rows: int, shape: ModelShape) -> tuple[Part, ...]:
    """Query, key and value, `[heads x head dim, hidden]` each.

    Megatron keeps what one key/value group needs together: the rows of its query heads, then those of
    its key, then those of its value. Both sides rotate halves (not neighbours) in the position
    embedding, so rows inside a head keep their order.
    """
    heads_a_group = shape.num_attention_heads // shape.num_query_groups
    sizes = heads_a_group * shape.kv_channels, shape.kv_channels, shape.kv_channels
    return tuple(Part(tensor, group * size, (group + 1) * size)
                 for group in range(shape.num_query_groups) for tensor, size in enumerate(sizes))


def gate_and_up(rows: int, shape: ModelShape) -> tuple[Part, ...]:
    """The gate, the half that goes through SiLU, and then the up projection, each `[ffn, hidden]`."""
    return Part(0, 0, shape.ffn_hidden_size), Part(1, 0, shape.ffn_hidden_size)


@dataclass(frozen=True)
class Held:
    """Rows of what tensor-parallel rank `rank` holds, from `start` on, and where they begin in the whole."""

    rank: int
    start: int
    rows: int
    row: int
    column: int


Cut = Callable[[Sequence[Sequence[int]]], list[Held]]
"""Where the parts of these shapes lie, a rank each."""


def cut_rows(shapes: Sequence[Sequence[int]]) -> list[Held]:
    """Ranks hold rows: of the vocabulary, or of whole key/value groups."""
    before = accumulate((shape[0] for shape in shapes), initial=0)
    return [Held(rank, 0, shape[0], row, 0) for (rank, shape), row in zip(enumerate(shapes), before)]


def cut_columns(shapes: Sequence[Sequence[int]]) -> list[Held]:
    """Ranks hold columns."""
    before = accumulate((shape[1] for shape in shapes), initial=0)
    return [Held(rank, 0, shape[0], 0, column) for (rank, shape), column in zip(enumerate(shapes), before)]


def cut_gate_and_up(shapes: Sequence[Sequence[int]]) -> list[Held]:
    """Each rank holds the gate's rows of its own and then the up projection's: first come all gates."""
    halves = [shape[0] // 2 for shape in shapes]
    up = sum(halves)
    return [held for (rank, half), row in zip(enumerate(halves), accumulate(halves, initial=0))
            for held in (Held(rank, 0, half, row, 0), Held(rank, half, half, up + row, 0))]


def copies(shapes: Sequence[Sequence[int]]) -> list[Held]:
    """Every rank holds the whole tensor."""
    return [Held(0, 0, shapes[0][0], 0, 0)]
