"""Each rule against the rows it should move, counted by hand."""

from __future__ import annotations

import torch

from megatron.pretrain.export import weights
from megatron.pretrain.export.names import LLAMA
from megatron.pretrain.export.shape import ModelShape

# 4 heads in 2 groups, head dimension 2: a group is 2 query heads, key, value = 8 rows.
SHAPE = ModelShape(
    num_layers=3, hidden_size=8, ffn_hidden_size=4, num_attention_heads=4, num_query_groups=2, kv_channels=2,
    max_position_embeddings=16, norm_epsilon=1e-5, rotary_base=10000.0, init_method_std=0.02,
    tied_embeddings=False, vocab_size=6)


def numbered_rows(count: int) -> torch.Tensor:
    """[count, hidden], every element its row's number."""
    return torch.arange(count).view(-1, 1).expand(count, SHAPE.hidden_size)


def rows_of(tensor: torch.Tensor) -> list[int]:
    assert (tensor == tensor[:, :1]).all()
    return tensor[:, 0].tolist()


def test_query_key_and_value_lie_together_for_each_group():
    query, key, value = weights.split_qkv(numbered_rows(16), SHAPE)
    assert rows_of(query) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rows_of(key) == [4, 5, 12, 13]
    assert rows_of(value) == [6, 7, 14, 15]


def test_gate_comes_before_up():
    gate, up = weights.split_gate_up(numbered_rows(8), SHAPE)
    assert (rows_of(gate), rows_of(up)) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_only_padding_is_trimmed():
    (kept,) = weights.trim_vocabulary(numbered_rows(9), SHAPE)
    assert rows_of(kept) == [0, 1, 2, 3, 4, 5]


def test_the_table_names_each_tensor_of_transformers_llama_once():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            num_hidden_layers=3, hidden_size=8, intermediate_size=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=2, vocab_size=6))
    made = []
    for rule in LLAMA.rules(SHAPE):
        size = [9 if length is None else length for length in rule.megatron_shape(SHAPE)]
        tensors = rule.to_hf(torch.empty(size, device="meta"), SHAPE)
        made += [(name, tensor.shape) for name, tensor in zip(rule.hf, tensors, strict=True)]
    assert sorted(made) == sorted((name, tensor.shape) for name, tensor in model.state_dict().items())
