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
        if self.tp_group.size() == 1:
            rows = _Lookup.apply(input_, self.weight)
        else:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            own = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
            rows = _Lookup.apply(own, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(),
                                                              group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Parameter) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        tokens, weight = ctx.saved_tensors
        if not hasattr(weight, "main_grad"):
            total = torch.zeros_like(weight, dtype=torch.float32)
            add_rows(total, tokens.flatten(), gradient.flatten(0, 1))
            return None, total.to(weight.dtype)
        add_rows(weight.main_grad, tokens.flatten(), gradient.flatten(0, 1))
        return None, delivered(weight)


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """total[tokens[i]] += rows[i] for total fp32 [vocabulary, h], tokens [n], rows [n, h].

    A token's rows are first summed among themselves, in one row of n: what is then added has the size of the
    batch, not of the vocabulary. Rows that are left over are zeros, and where they are added does not matter.
    """
    count = tokens.numel()
    ordered, order = tokens.sort(stable=True)
    number = (ordered[1:] != ordered[:-1]).cumsum(0)
    number = torch.cat([number.new_zeros(1), number])
    summed = torch.ops.aten.embedding_dense_backward(rows[order].float(), number, count, -1, False)
    place = torch.arange(count, device=tokens.device).remainder(total.size(0)).scatter_(0, number, ordered)
    total.index_add_(0, place, summed)
