"""Pure rules that turn a tensor of Megatron's layout into tensors of Hugging Face's.

Each takes one tensor and the model's shape and returns a tuple of tensors; none reads or writes
anything, and all work on tensors of the `meta` device too, which is how shapes are known beforehand.
"""

from __future__ import annotations

from torch import Tensor

from megatron.pretrain.export.shape import ModelShape


def same(tensor: Tensor, shape: ModelShape) -> tuple[Tensor]:
    """The tensor as it is."""
    return (tensor,)


def trim_vocabulary(tensor: Tensor, shape: ModelShape) -> tuple[Tensor]:
    """`[padded vocabulary, hidden]` -> `[vocabulary, hidden]`: the rows that only padded are dropped."""
    return (tensor[: shape.vocab_size],)


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


def split_gate_up(tensor: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """`[2 x ffn, hidden]` -> gate, the half that goes through SiLU, and up, each `[ffn, hidden]`."""
    gate, up = tensor.split(shape.ffn_hidden_size)
    return gate, up
