"""A decoder's logits straight from Megatron's tensors: what a converted model must compute.

Written from the formulas, on the tensors as training holds them, fused and grouped: it shares neither rules
nor code with the conversion that it judges. One layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from megatron.pretrain.export.shape import ModelShape

Read = Callable[[str], Tensor]


@torch.no_grad()
def megatron_logits(read: Read, names: Collection[str], shape: ModelShape, ids: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` in fp32 of `ids` `[tokens]`.

    `read` gives one of the tensors `names`, each in any floating-point type.
    """
    def weight(*spellings: str) -> Tensor:
        return read(next(name for name in spellings if name in names)).float()

    embedding = weight("embedding.word_embeddings.weight")
    hidden = embedding[ids]
    if not shape.tied_embeddings:
        del embedding
    for layer in range(shape.num_layers):
        at = f"decoder.layers.{layer}."
        into_attention = _rms_norm(hidden, weight(
            f"{at}input_layernorm.weight", f"{at}self_attention.linear_qkv.layer_norm_weight"), shape)
        query, key, value = _heads(into_attention, weight(f"{at}self_attention.linear_qkv.weight"), shape)
        if f"{at}self_attention.q_layernorm.weight" in names:
            query = _rms_norm(query, weight(f"{at}self_attention.q_layernorm.weight"), shape)
            key = _rms_norm(key, weight(f"{at}self_attention.k_layernorm.weight"), shape)
        seen = _attend(_rotate(query, shape), _rotate(key, shape), value)
        hidden = hidden + seen @ weight(f"{at}self_attention.linear_proj.weight").T
        into_mlp = _rms_norm(hidden, weight(
            f"{at}pre_mlp_layernorm.weight", f"{at}mlp.linear_fc1.layer_norm_weight"), shape)
        gate, up = (into_mlp @ weight(f"{at}mlp.linear_fc1.weight").T).chunk(2, dim=-1)
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weight(f"{at}mlp.linear_fc2.weight").T
    hidden = _rms_norm(hidden, weight("decoder.final_layernorm.weight"), shape)
    output = embedding if shape.tied_embeddings else weight("output_layer.weight")
    return hidden @ output[:shape.vocab_size].T


def _rms_norm(x: Tensor, weight: Tensor, shape: ModelShape) -> Tensor:
    """Zhang and Sennrich 2019, arXiv:1910.07467, equation 4."""
    return x / (x.square().mean(-1, keepdim=True) + shape.norm_epsilon).sqrt() * weight


def _heads(x: Tensor, qkv: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[tokens, groups, heads a group, dim]`, key and value `[tokens, groups, 1, dim]`."""
    together = (x @ qkv.T).view(x.shape[0], shape.num_query_groups, -1, shape.kv_channels)
    return together[:, :, :-2], together[:, :, -2:-1], together[:, :, -1:]


def _rotate(x: Tensor, shape: ModelShape) -> Tensor:
    """Su et al. 2021, arXiv:2104.09864, on the pairs (i, i + dim / 2); the first axis is the position."""
    half = shape.kv_channels // 2
    frequencies = shape.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float()[:, None, None], angles.sin().float()[:, None, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, `[tokens, heads x dim]`."""
    tokens, dim = query.shape[0], query.shape[-1]
    scores = torch.einsum("tghd,sgd->ghts", query, key.squeeze(2)) / dim ** 0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("ghts,sgd->tghd", weights, value.squeeze(2)).reshape(tokens, -1)
