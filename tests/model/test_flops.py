"""Sizes to the last digit, costs against what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.pretrain.config import ModelConfig
from megatron.pretrain.model.flops import flops_per_token, padded_vocab_size, parameter_count, peak_tflops


def _model(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **changes) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=kv_heads, max_position_embeddings=8192,
        **{"untie_embeddings_and_output_weights": True, **changes})


NEO_7B = _model(28, 3072, 24576, 16, 16)
NEO_2B = _model(18, 2048, 16384, 8, 1)
CT_LLM = _model(32, 2048, 5504, 16, 16)


@pytest.mark.parametrize(("model", "rows", "parameters"), [
    (NEO_7B, 64000, 7_792_143_360),
    (NEO_7B, 64256, 7_793_716_224),
    (NEO_2B, 64000, 2_244_028_416),
    (NEO_2B, 64256, 2_245_076_992),
    # 32 layers of 4 x 2048^2 + 3 x 2048 x 5504 + 2 x 2048, a norm, and two matrices of 125,696 rows.
    (CT_LLM, 125_696, 32 * (16_777_216 + 33_816_576 + 4096) + 2048 + 2 * 257_425_408),
])
def test_parameters_to_the_last_digit(model, rows, parameters):
    assert parameter_count(model, rows) == parameters


@pytest.mark.parametrize("changes", [
    {}, {"num_query_groups": 4}, {"num_query_groups": 1}, {"kv_channels": 24},
    {"untie_embeddings_and_output_weights": False},
])
def test_parameters_are_those_that_transformers_counts(changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = dataclasses.replace(_model(2, 64, 96, 4, 4), **changes)
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=model.kv_heads, head_dim=model.head_dim, vocab_size=128,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights))
    assert parameter_count(model, 128) == sum(weight.numel() for weight in theirs.parameters())


@pytest.mark.parametrize(("model", "tokens_per_second", "tflops"), [
    (NEO_2B, 36.5e3, 530),
    (NEO_2B, 37.3e3, 541),
    (NEO_2B, 37.9e3, 550),
    (dataclasses.replace(NEO_7B, num_layers=14), 21.5e3, 549),
    (dataclasses.replace(NEO_7B, num_layers=14), 22.2e3, 565),
    (NEO_7B, 11.0e3, 548),
    (dataclasses.replace(NEO_2B, num_layers=4), 67.0e3, 257),
])
def test_cost_of_a_token_agrees_with_measured_rows(model, tokens_per_second, tflops):
    """Rows of a table measured elsewhere (sequence 8192, 64256 rows), as exact as its rounded tokens/s."""
    assert flops_per_token(model, 8192, 64256) * tokens_per_second / 1e12 == pytest.approx(tflops, rel=5e-3)


def test_cost_of_a_token_is_what_torch_counts():
    """torch counts the products it runs, and so the full square of scores: twice the causal half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    model, seq_length = _model(2, 64, 96, 4, 2), 32
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(1, seq_length, dtype=torch.long)).logits.sum().backward()
    full_square = 2 * 12 * seq_length * 64
    assert counter.get_total_flops() / seq_length == flops_per_token(model, seq_length, 128) + full_square / 2


@pytest.mark.parametrize(("vocab_size", "tensor_parallel_size", "rows"), [
    (64000, 1, 64000), (64005, 1, 64128), (64005, 2, 64256), (64000, 8, 64512), (1, 1, 128), (128, 1, 128),
])
def test_the_vocabulary_is_padded_as_megatron_pads(vocab_size, tensor_parallel_size, rows):
    assert padded_vocab_size(vocab_size, 128, tensor_parallel_size) == rows


@pytest.mark.parametrize(("name", "bf16", "fp8"), [
    ("NVIDIA H100 80GB HBM3", 989.5, 1979),
    ("NVIDIA H200", 989.5, 1979),
    ("NVIDIA GH200 480GB", 989.5, 1979),
    ("NVIDIA H200 NVL", 835.5, 1671),
    ("NVIDIA H100 PCIe", 756.5, 1513),
    ("NVIDIA H20", 148, 296),
    ("NVIDIA A100-SXM4-80GB", 312, None),
    ("NVIDIA GB200", 2500, 5000),
    ("NVIDIA B200", 2250, 4500),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ("Tesla T4", None, None),
    ("cpu", None, None),
])
def test_peaks_by_name(name, bf16, fp8):
    assert (peak_tflops(name), peak_tflops(name, "fp8")) == (bf16, fp8)


def test_a_precision_without_a_peak_has_none():
    assert peak_tflops("NVIDIA H200", "fp32") is None
