"""The table of names: which Megatron tensor becomes which Hugging Face tensors, and by which rule.

Another architecture of Llama's shape is another table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron.pretrain.export import weights
from megatron.pretrain.export.shape import ModelShape


@dataclass(frozen=True)
class Rule:
    """One row of the table. `{layer}` in a name stands for the layer's number.

    `megatron` holds every spelling of the tensor's name: Transformer Engine fuses a norm into the
    linear layer after it, and Megatron-LM saves the norms of plain layers under those names too.
    `megatron_shape` gives the tensor's shape; None is an axis of any length.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    megatron_shape: Callable[[ModelShape], tuple[int | None, ...]]
    to_hf: Callable[[Tensor, ModelShape], tuple[Tensor, ...]] = weights.same

    def at(self, layer: int) -> Rule:
        """The rule of one layer."""
        return Rule(tuple(name.format(layer=layer) for name in self.megatron),
                    tuple(name.format(layer=layer) for name in self.hf),
                    self.megatron_shape, self.to_hf)


def _vector(shape: ModelShape) -> tuple[int, ...]:
    return (shape.hidden_size,)


def _vocabulary(shape: ModelShape) -> tuple[int | None, ...]:
    return (None, shape.hidden_size)


EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",),
    ("model.embed_tokens.weight",),
    _vocabulary, weights.trim_vocabulary)

LAYER = (
    Rule(("decoder.layers.{layer}.input_layernorm.weight",
          "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight"),
         ("model.layers.{layer}.input_layernorm.weight",),
         _vector),
    Rule(("decoder.layers.{layer}.self_attention.linear_qkv.weight",),
         ("model.layers.{layer}.self_attn.q_proj.weight",
          "model.layers.{layer}.self_attn.k_proj.weight",
          "model.layers.{layer}.self_attn.v_proj.weight"),
         lambda s: ((s.num_attention_heads + 2 * s.num_query_groups) * s.kv_channels, s.hidden_size),
         weights.split_qkv),
    Rule(("decoder.layers.{layer}.self_attention.linear_proj.weight",),
         ("model.layers.{layer}.self_attn.o_proj.weight",),
         lambda s: (s.hidden_size, s.num_attention_heads * s.kv_channels)),
    Rule(("decoder.layers.{layer}.pre_mlp_layernorm.weight",
          "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"),
         ("model.layers.{layer}.post_attention_layernorm.weight",),
         _vector),
    Rule(("decoder.layers.{layer}.mlp.linear_fc1.weight",),
         ("model.layers.{layer}.mlp.gate_proj.weight",
          "model.layers.{layer}.mlp.up_proj.weight"),
         lambda s: (2 * s.ffn_hidden_size, s.hidden_size),
         weights.split_gate_up),
    Rule(("decoder.layers.{layer}.mlp.linear_fc2.weight",),
         ("model.layers.{layer}.mlp.down_proj.weight",),
         lambda s: (s.hidden_size, s.ffn_hidden_size)),
)

FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), _vector)

OUTPUT = Rule(
    ("output_layer.weight",),
    ("lm_head.weight",),
    _vocabulary, weights.trim_vocabulary)


def llama_rules(shape: ModelShape) -> Iterator[Rule]:
    """Every rule of a Llama of this shape, in the order its tensors are written."""
    yield EMBEDDING
    for layer in range(shape.num_layers):
        yield from (rule.at(layer) for rule in LAYER)
    yield FINAL_NORM
    if not shape.tied_embeddings:
        yield OUTPUT
