"""Each rule against the rows it should move, counted by hand."""

from __future__ import annotations

import torch

from megatron.pretrain.export import weights
from megatron.pretrain.export.names import LLAMA, Rule
from megatron.pretrain.export.shape import ModelShape

# 4 heads in 2 groups, head dimension 2: a group is 2 query heads, key, value = 8 rows.
SHAPE = ModelShape(
    num_layers=3, hidden_size=8, ffn_hidden_size=4, num_attention_heads=4, num_query_groups=2, kv_channels=2,
    max_position_embeddings=16, norm_epsilon=1e-5, rotary_base=10000.0, init_method_std=0.02,
    tied_embeddings=False, vocab_size=6)


def hf_rows(rule: Rule, rows: int) -> list[list[int]]:
    """The rows of Megatron's tensor that each Hugging Face tensor of the rule consists of."""
    return [[row for some in taken for row in some] for taken in rule.hf_rows(rows, SHAPE)]


def rule_for(name: str) -> Rule:
    return next(rule for rule in LLAMA.rules(SHAPE) if any(name in hf_name for hf_name in rule.hf))


def test_query_key_and_value_lie_together_for_each_group():
    query, key, value = hf_rows(rule_for("layers.1.self_attn.k_proj"), 16)
    assert query == [0, 1, 2, 3, 8, 9, 10, 11]
    assert key == [4, 5, 12, 13]
    assert value == [6, 7, 14, 15]


def test_gate_comes_before_up():
    assert rule_for("gate_proj").hf == (
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert hf_rows(rule_for("gate_proj"), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_only_padding_is_left_out():
    assert hf_rows(rule_for("embed_tokens"), 9) == [[0, 1, 2, 3, 4, 5]]


def test_ranks_hold_parts_of_the_gate_and_of_the_up_projection():
    held = weights.cut_gate_and_up([(4, 8), (4, 8)])
    assert [(one.rank, one.start, one.rows, one.row) for one in held] == [
        (0, 0, 2, 0), (0, 2, 2, 4), (1, 0, 2, 2), (1, 2, 2, 6)]


def test_the_table_names_each_tensor_of_transformers_llama_once():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            num_hidden_layers=3, hidden_size=8, intermediate_size=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=2, vocab_size=6))
    made = []
    for rule in LLAMA.rules(SHAPE):
        size = [9 if length is None else length for length in rule.megatron_shape(SHAPE)]
        made += [(name, torch.Size([len(rows), *size[1:]]))
                 for name, rows in zip(rule.hf, hf_rows(rule, size[0]), strict=True)]
    assert sorted(made) == sorted((name, tensor.shape) for name, tensor in model.state_dict().items())
