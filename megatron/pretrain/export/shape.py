"""The sizes of a Llama-shaped model, as run.json of its checkpoint gives them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.pretrain.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    `vocab_size` counts the rows to keep for Hugging Face, `padded_vocab_size` those of a checkpoint to train
    from.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    init_method_std: float
    tied_embeddings: bool
    vocab_size: int
    padded_vocab_size: int = 0


def model_shape(manifest: Manifest, vocab_size: int) -> ModelShape:
    """The shape of the model that `manifest` describes, with `vocab_size` rows of its vocabulary."""
    model = manifest.config["model"]
    return ModelShape(
        num_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["ffn_hidden_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model["num_query_groups"],
        kv_channels=model["kv_channels"],
        max_position_embeddings=model["max_position_embeddings"],
        norm_epsilon=model["norm_epsilon"],
        rotary_base=model["rotary_base"],
        init_method_std=model["init_method_std"],
        tied_embeddings=not model["untie_embeddings_and_output_weights"],
        vocab_size=vocab_size,
        padded_vocab_size=model.get("padded_vocab_size", vocab_size))
