"""megatron-core's GPT model with the `fused` layers, output head and loss."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron.pretrain.model.fused.attention import FusedSelfAttention
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.layer import FusedTransformerLayer
from megatron.pretrain.model.fused.linear import ColumnLinear, RowLinear, linear
from megatron.pretrain.model.fused.loss import vocab_parallel_cross_entropy
from megatron.pretrain.model.fused.mlp import GatedMLP
from megatron.pretrain.model.fused.norm import FusedRMSNorm


def layer_spec(engine: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage; weights have the names of the engine's local spec."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.module = FusedTransformerLayer
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = FusedRMSNorm
    attention = parts.self_attention
    attention.module = FusedSelfAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = ColumnLinear, RowLinear
    attention.submodules.core_attention = IdentityOp
    parts.mlp = GatedMLP
    count = get_num_layers_to_build(engine, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=FusedRMSNorm)


class FusedGPTModel(GPTModel):
    """The engine's model; its head accumulates weight gradients as the layers do, its loss is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer._forward_impl = linear

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocabulary / ranks] -> loss of each token [b, s] in fp32."""
        kernel = kernels_for(logits.device, logits.dtype).loss
        losses = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), self.pg_collection.tp, kernel)
        return losses.t().contiguous()
