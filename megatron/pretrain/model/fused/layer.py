"""One transformer layer of the `fused` spec: attention and MLP, which call their norms and add the residual."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class FusedTransformerLayer(TransformerLayer):
    """The engine's layer: its construction, names and checkpoint form, with a shorter forward pass."""

    def forward(self, hidden_states: Tensor, attention_mask: None = None, context: None = None,
                context_mask: None = None, rotary_pos_emb: Tensor | None = None,
                **_: object) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] -> ([s, b, h], None); attention is causal, so there is no mask to read."""
        hidden = self.self_attention(hidden_states, self.input_layernorm, rotary_pos_emb)
        return self.mlp(hidden, self.pre_mlp_layernorm), None
