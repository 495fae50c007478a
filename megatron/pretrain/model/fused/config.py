"""What the fused layers are told beside the engine's description of a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig


@dataclass
class FusedConfig(TransformerConfig):
    """The engine's settings, which it changes as it reads them, and ours."""

    collectives_beside_products: bool = False
    """Whether gradients are reduced or weights gathered while the layers compute, on some of the GPU's cores."""
