"""What a model weighs and what a token of it costs: arithmetic on its shape, with nothing built."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron.pretrain.config import ModelConfig


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_parallel_size: int = 1) -> int:
    """Rows of the embedding: the vocabulary, up to a multiple of `divisible_by` x tensor-parallel size.

    As Megatron-LM pads, so that each tensor-parallel rank holds the same, well-aligned number of rows.
    """
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Weights of the matrices of one layer: query, key, value, projection, gate, up and down."""
    attention = 2 * (model.num_attention_heads + model.kv_heads) * model.head_dim * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return attention + mlp


def parameter_count(model: ModelConfig, padded_vocab: int) -> int:
    """All weights of the model, over all ranks, with `padded_vocab` rows of embedding.

    A layer has its matrices and two norms; around the layers are the embedding, the last norm and,
    where untied, the output layer.
    """
    embeddings = 2 if model.untie_embeddings_and_output_weights else 1
    layer = layer_matrix_parameters(model) + 2 * model.hidden_size
    return model.num_layers * layer + model.hidden_size + embeddings * padded_vocab * model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocab: int) -> float:
    """Floating-point operations of the forward and backward pass, per token of training.

    6 for each weight that multiplies a token (2 forward, 4 backward: D. Narayanan et al., "Efficient
    Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC21, appendix), which are the
    layers' matrices and the output layer; and causal attention counted once: of the full square of
    scores, which costs 12 * seq_length * heads * head_dim a layer, the half that is not masked.
    Recomputation is not counted: it is a cost of the method, not of the model.
    """
    matrices = model.num_layers * layer_matrix_parameters(model) + padded_vocab * model.hidden_size
    attention = model.num_layers * seq_length * model.num_attention_heads * model.head_dim
    return 6.0 * (matrices + attention)


@dataclass(frozen=True)
class _Peak:
    """Dense matrix-product rates of a GPU, as its data sheet gives them without sparsity."""

    name: str
    """Regular expression, found in the device's name between word ends."""
    bf16_tflops: float
    fp8_tflops: float | None


# NVIDIA's data sheets print most of these figures with sparsity, which doubles them. The more special
# name stands before the more general one.
_PEAKS = (
    _Peak("GB200", 2500, 5000),  # GB200 NVL72: 360 PFLOPS of sparse BF16 over 72 GPUs
    _Peak("B200", 2250, 4500),  # HGX B200: 36 PFLOPS of sparse BF16 over 8 GPUs
    _Peak("H[12]00 NVL", 835.5, 1671),  # 1671 sparse
    _Peak("H[18]00 PCIe", 756.5, 1513),  # 1513 sparse
    _Peak("H100|H800|H200|GH200", 989.5, 1979),  # SXM: 1979 sparse
    _Peak("H20", 148, 296),
    _Peak("L40S", 362.05, 733),
    _Peak("A100|A800", 312, None),
)


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of a GPU in TFLOP/s, by the name that `torch.cuda.get_device_name` gives.

    Args:
        device_name: such as "NVIDIA H100 80GB HBM3".
        precision: of the matrix products, "bf16" or "fp8".

    Returns:
        None for a device that is not listed, a slice of one (MIG), or a precision it has no peak for:
        then there is no MFU to speak of.
    """
    if " MIG " in device_name:
        return None
    for peak in _PEAKS:
        if re.search(rf"\b(?:{peak.name})\b", device_name):
            return {"bf16": peak.bf16_tflops, "fp8": peak.fp8_tflops}.get(precision)
    return None
