"""The embedding, whose gradient is summed in fp32 straight into its accumulator: only the rows of a batch move."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor
from torch.nn import Parameter, functional

from megatron.pretrain.model.fused.kernels import installed
from megatron.pretrain.model.fused.products import delivered


class TokenEmbedding(LanguageModelEmbedding):
    """The engine's embedding layer without positions and dropout: there are no random states to switch between."""

    def forward(self, input_ids: Tensor, position_ids: None = None, tokentype_ids: None = None) -> Tensor:
        """Token ids [b, s] -> [s, b, h], with sequence parallelism a shard of s."""
        rows = self.word_embeddings(input_ids)
        return rows if self.reduce_scatter_embeddings else rows.transpose(0, 1).contiguous()


class VocabularyTable(VocabParallelEmbedding):
    """The engine's vocabulary-parallel table with `_Lookup` for its rows."""

    def forward(self, input_: Tensor) -> Tensor:
        """Token ids [b, s] -> [b, s, h], or with `reduce_scatter_embeddings` a shard of [s, b, h]."""
        if self.deterministic_mode:
            return super().forward(input_)
        partial = self.tp_group.size() > 1
        rows = _Lookup.apply(input_ - self.vocab_start_index if partial else input_, self.weight, partial)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(),
                                                              group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    """Rows of weight [vocabulary, h] by tokens [b, s]; of a rank's part of them, zeros for tokens of other ranks."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Parameter, partial: bool) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        if not partial:
            return functional.embedding(tokens, weight)
        elsewhere = (tokens < 0) | (tokens >= weight.size(0))
        return functional.embedding(tokens.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        held = hasattr(weight, "main_grad")
        total = weight.main_grad if held else torch.zeros_like(weight, dtype=torch.float32)
        add_rows(total, tokens.flatten(), gradient.flatten(0, 1).contiguous())
        return None, delivered(weight) if held else total.to(weight.dtype), None


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """total[tokens[i]] += rows[i] for total fp32 [vocabulary, h], tokens [n], contiguous rows [n, h].

    Tokens that are no row of total are passed over.
    """
    if total.is_cuda and installed("triton"):
        from megatron.pretrain.model.fused.triton_rows import add_by_token

        add_by_token(total, tokens, rows)
    else:
        # Others add noughts: to leave them out the host would have to wait for their number.
        others = (tokens < 0) | (tokens >= total.size(0))
        total.index_add_(0, tokens.masked_fill(others, 0), rows.float().masked_fill(others[:, None], 0))
