"""Pure rules between a tensor of Megatron's layout and tensors of Hugging Face's, in both directions.

`split_*` and `trim_*` turn one tensor of Megatron into a tuple for Hugging Face. `stack`, `merge_*` and
`pad_*` take such a tuple back, and give the pieces whose rows, one after the other, are Megatron's tensor:
so none is copied that need not be. `join_*` put together what tensor-parallel ranks hold of one tensor. None
reads or writes anything, and all work on tensors of the `meta` device too, which is how shapes are known
beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.pretrain.export.shape import ModelShape


def same(tensor: Tensor, shape: ModelShape) -> tuple[Tensor]:
    """The tensor as it is."""
    return (tensor,)


def stack(tensors: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
    """The tensors as they are; of the MLP's two, gate comes before up."""
    return tuple(tensors)


def trim_vocabulary(tensor: Tensor, shape: ModelShape) -> tuple[Tensor]:
    """`[padded vocabulary, hidden]` -> `[vocabulary, hidden]`: the rows that only padded are dropped."""
    return (tensor[: shape.vocab_size],)


def pad_vocabulary(tensors: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
    """`[rows, hidden]` -> the same, and `[padding, hidden]`: added rows are the mean of those that are there.

    In the output layer such a row's logit is the mean logit, and the exponential of a mean is at most the
    mean of exponentials (Jensen): so padding can add at most log(padded / rows) to the loss of any token,
    whatever the hidden state is. Rows of zeros have no such bound.
    """
    (tensor,) = tensors
    rows, padded = tensor.shape[0], shape.padded_vocab_size
    if rows >= padded:
        return (tensor,)
    return tensor, _mean_row(tensor).to(tensor.dtype).expand(padded - rows, -1)


def _mean_row(tensor: Tensor) -> Tensor:
    """`[rows, hidden]` -> `[hidden]` in fp32, without the whole tensor in fp32 on the way."""
    sums = [rows.sum(dim=0, dtype=torch.float32) for rows in tensor.split(2048)]
    return torch.stack(sums).sum(dim=0) / len(tensor)


def split_qkv(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """`[groups x (heads a group + 2) x head dim, hidden]` -> query, key, value.

    Megatron keeps what one key/value group needs together: the rows of its query heads, then those of
    its key, then those of its value. Both sides rotate halves (not neighbours) in the position
    embedding, so rows inside a head keep their order.
    """
    groups, head_dim = shape.num_query_groups, shape.kv_channels
    heads_a_group = shape.num_attention_heads // groups
    grouped = tensor.view(groups, (heads_a_group + 2) * head_dim, shape.hidden_size)
    parts = grouped.split([heads_a_group * head_dim, head_dim, head_dim], dim=1)
    return tuple(part.reshape(-1, shape.hidden_size) for part in parts)


def merge_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor]:
    """Query, key, value -> what `split_qkv` splits."""
    groups = [tensor.view(shape.num_query_groups, -1, shape.hidden_size) for tensor in tensors]
    return (torch.cat(groups, dim=1).view(-1, shape.hidden_size),)


def split_gate_up(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """`[2 x ffn, hidden]` -> gate, the half that goes through SiLU, and up, each `[ffn, hidden]`."""
    gate, up = tensor.split(shape.ffn_hidden_size)
    return gate, up


def join_rows(shards: Sequence[Tensor]) -> Tensor:
    """Ranks hold rows: of the vocabulary, or of whole key/value groups."""
    return torch.cat(tuple(shards))


def join_columns(shards: Sequence[Tensor]) -> Tensor:
    """Ranks hold columns."""
    return torch.cat(tuple(shards), dim=1)


def join_gate_up(shards: Sequence[Tensor]) -> Tensor:
    """Each rank holds the gate's rows of its own and then the up projection's: first come all gates."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def join_copies(shards: Sequence[Tensor]) -> Tensor:
    """Every rank holds the whole tensor."""
    return shards[0]
