"""The table of names: which Megatron tensor becomes which Hugging Face tensors, and by which rule.

One table serves both directions. Another architecture of Llama's shape is another table: an `Architecture`
with its layer's rules and what its config.json says in addition.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.pretrain.errors import UserError
from megatron.pretrain.export import weights
from megatron.pretrain.export.shape import ModelShape


@dataclass(frozen=True)
class Rule:
    """One row of the table. `{layer}` in a name stands for the layer's number.

    `megatron` holds every spelling of the tensor's name: Transformer Engine fuses a norm into the
    linear layer after it, and Megatron-LM saves the norms of plain layers under those names too. The
    last one is written. `megatron_shape` gives the tensor's shape; None is an axis of any length.
    `rows` says of which rows of the Hugging Face tensors it consists, `cut` how tensor-parallel ranks share
    it.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    megatron_shape: Callable[[ModelShape], tuple[int | None, ...]]
    rows: weights.Rows = weights.same
    cut: weights.Cut = weights.copies

    def hf_rows(self, rows: int, shape: ModelShape) -> list[list[range]]:
        """For each Hugging Face tensor those of Megatron's `rows` that it consists of."""
        taken: list[list[range]] = [[] for _ in self.hf]
        at = 0
        for part in self.rows(rows, shape):
            end = at + part.stop - part.start
            taken[part.tensor].append(range(at, end))
            at = end
        return taken

    def at(self, layer: int) -> Rule:
        """The rule of one layer."""
        return dataclasses.replace(self, megatron=tuple(name.format(layer=layer) for name in self.megatron),
                                   hf=tuple(name.format(layer=layer) for name in self.hf))


def _vector(shape: ModelShape) -> tuple[int, ...]:
    return (shape.hidden_size,)


def _head_vector(shape: ModelShape) -> tuple[int, ...]:
    return (shape.kv_channels,)


def _vocabulary(shape: ModelShape) -> tuple[int | None, ...]:
    return (None, shape.hidden_size)


EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",),
    ("model.embed_tokens.weight",),
    _vocabulary, weights.vocabulary, weights.cut_rows)

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
         weights.grouped_qkv, weights.cut_rows),
    Rule(("decoder.layers.{layer}.self_attention.linear_proj.weight",),
         ("model.layers.{layer}.self_attn.o_proj.weight",),
         lambda s: (s.hidden_size, s.num_attention_heads * s.kv_channels),
         cut=weights.cut_columns),
    Rule(("decoder.layers.{layer}.pre_mlp_layernorm.weight",
          "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"),
         ("model.layers.{layer}.post_attention_layernorm.weight",),
         _vector),
    Rule(("decoder.layers.{layer}.mlp.linear_fc1.weight",),
         ("model.layers.{layer}.mlp.gate_proj.weight",
          "model.layers.{layer}.mlp.up_proj.weight"),
         lambda s: (2 * s.ffn_hidden_size, s.hidden_size),
         weights.gate_and_up, weights.cut_gate_and_up),
    Rule(("decoder.layers.{layer}.mlp.linear_fc2.weight",),
         ("model.layers.{layer}.mlp.down_proj.weight",),
         lambda s: (s.hidden_size, s.ffn_hidden_size),
         cut=weights.cut_columns),
)

# A norm on each head's query and key (Dehghani et al. 2023, arXiv:2302.05442).
QK_NORM = (
    Rule(("decoder.layers.{layer}.self_attention.q_layernorm.weight",),
         ("model.layers.{layer}.self_attn.q_norm.weight",),
         _head_vector),
    Rule(("decoder.layers.{layer}.self_attention.k_layernorm.weight",),
         ("model.layers.{layer}.self_attn.k_norm.weight",),
         _head_vector),
)

FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), _vector)

OUTPUT = Rule(
    ("output_layer.weight",),
    ("lm_head.weight",),
    _vocabulary, weights.vocabulary, weights.cut_rows)


@dataclass(frozen=True)
class Architecture:
    """A decoder that Hugging Face has a class for, as a table.

    `config` is what its config.json says beside the sizes: written so, and refused where it says otherwise.
    `trainable` tells whether this project's trainer builds such layers.
    """

    name: str
    model_type: str
    layer: tuple[Rule, ...] = LAYER
    config: Mapping[str, Any] = field(default_factory=dict)
    trainable: bool = True

    @property
    def has_qk_norm(self) -> bool:
        """Whether its layers norm each head's query and key."""
        return set(QK_NORM) <= set(self.layer)

    def rules(self, shape: ModelShape) -> Iterator[Rule]:
        """Every rule of a model of this shape, in the order its tensors are written."""
        yield EMBEDDING
        for layer in range(shape.num_layers):
            yield from (rule.at(layer) for rule in self.layer)
        yield FINAL_NORM
        if not shape.tied_embeddings:
            yield OUTPUT


LLAMA = Architecture("LlamaForCausalLM", "llama", config={"attention_bias": False, "mlp_bias": False})
MISTRAL = Architecture("MistralForCausalLM", "mistral", config={"sliding_window": None})
QWEN3 = Architecture(
    "Qwen3ForCausalLM", "qwen3", LAYER + QK_NORM, trainable=False,
    config={"attention_bias": False, "use_sliding_window": False})

ARCHITECTURES = {one.name: one for one in (LLAMA, MISTRAL, QWEN3)}


def find_architecture(name: str, where: str) -> Architecture:
    """The table of that name. Raises UserError if there is none; `where` says who asked for it."""
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: {name} is not known here; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def rule_of(name: str) -> Rule | None:
    """The rule, of whatever architecture, that a Megatron tensor of this name falls under."""
    return _RULES.get(re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", name))


_RULES = {name: rule for rule in (EMBEDDING, *LAYER, *QK_NORM, FINAL_NORM, OUTPUT) for name in rule.megatron}
