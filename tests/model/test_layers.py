"""Our layers against their formulas in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron.pretrain.model.layers import CausalAttention, RMSNorm


def config_of(dtype: torch.dtype, **settings) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, params_dtype=dtype,
                             attention_dropout=settings.pop("attention_dropout", 0.0), **settings)


def gradients(output: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 3, 48), (1, 1, 1), (5, 130)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, eps: float):
    torch.manual_seed(0)
    norm = RMSNorm(config_of(dtype), hidden_size=shape[-1], eps=eps)
    hidden = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1]) + 0.5)
    output = norm(hidden)

    exact_hidden, exact_weight = (value.detach().double().requires_grad_() for value in (hidden, norm.weight))
    mean_square = exact_hidden.pow(2).mean(-1, keepdim=True)
    exact = exact_hidden / (mean_square + eps).sqrt() * exact_weight

    assert output.dtype == dtype and norm.weight.dtype == dtype
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)
    ours = gradients(output, upstream, hidden, norm.weight)
    theirs = gradients(exact, upstream, exact_hidden, exact_weight)
    for mine, right in zip(ours, theirs, strict=True):
        # A gradient of the weight sums over positions, and a sum of rounded terms strays with its size.
        torch.testing.assert_close(mine.double(), right, atol=tolerance * max(1.0, right.abs().max().item()),
                                   rtol=tolerance)


def test_rms_norm_starts_at_one_and_tells_sequence_parallel():
    assert torch.equal(RMSNorm(config_of(torch.float32), 8).weight, torch.ones(8))
    assert RMSNorm(config_of(torch.float32), 8).weight.sequence_parallel is False
    split = config_of(torch.float32, sequence_parallel=True, tensor_model_parallel_size=2)
    assert RMSNorm(split, 8).weight.sequence_parallel is True


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over each score that is not in the future; query head h reads key/value head h // shared_by."""
    length, batch, heads, dim = query.shape
    shared_by = heads // key.size(2)
    rows = []
    for head in range(heads):
        q, k, v = query[:, :, head], key[:, :, head // shared_by], value[:, :, head // shared_by]
        scores = torch.einsum("sbd,tbd->bst", q, k) / dim**0.5
        future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        rows.append(torch.einsum("bst,tbd->sbd", weights, v))
    return torch.cat(rows, dim=-1)


@pytest.mark.parametrize("length, batch, heads, kv_heads, dim", [
    (16, 2, 4, 4, 8),      # multi-head
    (16, 2, 6, 2, 8),      # grouped-query
    (16, 2, 4, 1, 8),      # multi-query
    (1, 1, 2, 1, 4),       # a single token sees itself
    (37, 3, 5, 5, 18),     # nothing a multiple of anything
    (130, 1, 3, 1, 192),   # past a block of a fused kernel, with NEO-7B's head
])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_attention_is_causal_softmax(length, batch, heads, kv_heads, dim, dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(length, batch, count, dim, dtype=torch.float64).to(dtype).requires_grad_()
              for count in (heads, kv_heads, kv_heads)]
    exact_inputs = [part.detach().double().requires_grad_() for part in inputs]
    upstream = torch.randn(length, batch, heads * dim, dtype=torch.float64).to(dtype)
    output = CausalAttention(config_of(dtype))(*inputs)
    exact = explicit_attention(*exact_inputs)

    assert output.shape == (length, batch, heads * dim) and output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)
    for mine, right in zip(gradients(output, upstream, *inputs), gradients(exact, upstream, *exact_inputs),
                           strict=True):
        torch.testing.assert_close(mine.double(), right, atol=tolerance, rtol=tolerance)


def test_attention_drops_out_only_while_it_trains():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 64, 1, 4, 8).unbind()
    attention = CausalAttention(config_of(torch.float32, attention_dropout=0.5))
    exact = explicit_attention(query, key, value)
    assert not torch.allclose(attention(query, key, value), exact, atol=1e-2)
    torch.testing.assert_close(attention.eval()(query, key, value), exact, atol=2e-5, rtol=2e-5)
