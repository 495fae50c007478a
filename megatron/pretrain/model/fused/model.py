"""megatron-core's GPT model with the `fused` layers, output head and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused.attention import FusedSelfAttention
from megatron.pretrain.model.fused.embedding import TokenEmbedding, VocabularyTable
from megatron.pretrain.model.fused.fp8_linear import Fp8ColumnLinear, Fp8RowLinear
from megatron.pretrain.model.fused.fp8_mlp import Fp8GatedMLP
from megatron.pretrain.model.fused.fp8_model import Fp8State
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.layer import FusedTransformerLayer
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear, linear
from megatron.pretrain.model.fused.loss import vocab_parallel_cross_entropy
from megatron.pretrain.model.fused.mlp import GatedMLP
from megatron.pretrain.model.fused.norm import FusedRMSNorm


def layer_spec(engine: TransformerConfig, stage: int | None,
               in_fp8: Callable[[int], bool] = lambda layer: False) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage; weights have the names of the engine's local spec.

    `in_fp8` says of a layer of the whole model, counted from 0, whether its products are in fp8.
    """
    first = get_transformer_layer_offset(engine, vp_stage=stage)
    count = get_num_layers_to_build(engine, vp_stage=stage)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(fp8=in_fp8(first + place)) for place in range(count)], layer_norm=FusedRMSNorm)


def _layer(*, fp8: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.module = FusedTransformerLayer
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = FusedRMSNorm
    attention = parts.self_attention
    attention.module = FusedSelfAttention
    attention.submodules.linear_qkv = Fp8ColumnLinear if fp8 else ColumnLinear
    attention.submodules.linear_proj = Fp8RowLinear if fp8 else RowLinear
    attention.submodules.core_attention = IdentityOp
    parts.mlp = Fp8GatedMLP if fp8 else GatedMLP
    return layer


class FusedGPTModel(GPTModel):
    """The engine's model; its embedding and head accumulate gradients as the layers do, its loss is ours."""

    fp8: Fp8State | None = None
    """Set once the model is on its device, where any of its layers is in fp8."""
    recording: Any = None
    """Set where micro-batches are to be CUDA graphs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pre_process:
            self.embedding.__class__ = TokenEmbedding
            self.embedding.word_embeddings.__class__ = VocabularyTable
        if self.post_process:
            self.output_layer._forward_impl = linear

    def accumulated_weights(self) -> list[Parameter]:
        """The weights whose gradients our products write into the fp32 accumulator, in every micro-batch."""
        parts = [part for part in self.modules() if isinstance(part, ColumnLinear | RowLinear)]
        if self.post_process and not self.share_embeddings_and_output_weights:
            parts.append(self.output_layer)
        return [part.weight for part in parts]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocabulary / ranks] -> loss of each token [b, s] in fp32."""
        kernel = kernels_for(logits.device, logits.dtype).loss
        losses = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), self.pg_collection.tp, kernel)
        return losses.t().contiguous()
