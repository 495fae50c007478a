"""The models that benchmarks measure, by name: their shapes, and a small one for machines without a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model and of what it reads."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int = 8192
    vocab_size: int = 64256
    """Rows of the embedding."""


MODELS = {
    "7b": Shape(num_layers=28, hidden_size=3072, ffn_hidden_size=24576, num_attention_heads=16,
                num_query_groups=16, kv_channels=192),
    "2b": Shape(num_layers=18, hidden_size=2048, ffn_hidden_size=16384, num_attention_heads=8,
                num_query_groups=1, kv_channels=256),
    "ctllm": Shape(num_layers=32, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16,
                   num_query_groups=16, kv_channels=128),
    "neo-test": Shape(num_layers=4, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=8,
                      num_query_groups=8, kv_channels=128),
    "tiny": Shape(num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4,
                  num_query_groups=2, kv_channels=16, seq_length=64, vocab_size=1024),
}
