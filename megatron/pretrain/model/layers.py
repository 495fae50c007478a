"""Layers of the `local` spec: torch alone, on any device, exact under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    The engine's own torch norm refuses sequence parallelism; this one marks its weight instead, so that the
    engine sums the weight's gradient over the tensor-parallel ranks, each of which sees part of a sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CausalAttention(MegatronModule):
    """Causal attention through torch's fused kernels: no score matrix in memory.

    Grouped-query attention shares key/value heads by repetition, which every kernel of torch takes.
    """

    def __init__(self, config: TransformerConfig, *_: object, attention_dropout: float | None = None,
                 **__: object) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv heads, d] -> [s, b, heads * d]."""
        shared_by = query.size(2) // key.size(2)
        if shared_by > 1:
            key, value = (part.repeat_interleave(shared_by, dim=2) for part in (key, value))
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        context = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return context.permute(2, 0, 1, 3).flatten(2)
