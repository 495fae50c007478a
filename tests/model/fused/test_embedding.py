"""The embedding's gradient against float64, rows that repeat and rows that do not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter, functional

from megatron.pretrain.model.fused.embedding import _Lookup, add_rows

DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count, vocabulary", [(1, 1), (7, 3), (64, 1000), (5000, 300), (8192, 64256)])
def test_rows_are_summed(count: int, vocabulary: int, device: str) -> None:
    torch.manual_seed(0)
    # Of a part of a vocabulary, whose other tokens lie before and behind.
    tokens = torch.randint(-2, vocabulary + 2, (count,), device=device).sort(descending=True).values.roll(count // 3)
    rows = torch.randn(count, 16, device=device).bfloat16()
    start = torch.randn(vocabulary, 16, device=device)
    total = start.clone()
    add_rows(total, tokens, rows)
    own = (tokens >= 0) & (tokens < vocabulary)
    exact = start.double().index_add(0, tokens[own], rows[own].double())
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(vocabulary, dtype=torch.bool, device=device).index_fill(0, tokens[own], False)
    assert torch.equal(total[untouched], start[untouched])


@pytest.mark.parametrize("device", DEVICES)
def test_lookup(device: str) -> None:
    tokens = torch.tensor([[3, 0, 3], [1, 3, 0]], device=device)
    weight = Parameter(torch.randn(5, 8, device=device))
    upstream = torch.randn(2, 3, 8, device=device)
    (exact,) = torch.autograd.grad(functional.embedding(tokens, weight), weight, upstream)
    out = _Lookup.apply(tokens, weight, False)
    assert torch.equal(out, functional.embedding(tokens, weight))
    torch.testing.assert_close(torch.autograd.grad(out, weight, upstream)[0], exact)
    weight.main_grad = torch.ones(5, 8, device=device)
    _Lookup.apply(tokens, weight, False).backward(upstream)
    torch.testing.assert_close(weight.main_grad, exact + 1)
    assert weight.grad_added_to_main_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_the_vocabulary_leaves_the_others_tokens_out(device: str) -> None:
    """Parts of all ranks add up to the whole, forward and backward."""
    tokens = torch.tensor([[3, 0, 3], [1, 3, 0]], device=device)
    whole, upstream = torch.randn(6, 8, device=device), torch.randn(2, 3, 8, device=device)
    parts = [Parameter(part.clone()) for part in whole.chunk(3)]
    out = [_Lookup.apply(tokens - 2 * number, part, True) for number, part in enumerate(parts)]
    assert torch.equal(sum(out), functional.embedding(tokens, whole))
    gradients = [torch.autograd.grad(rows, part, upstream)[0] for rows, part in zip(out, parts, strict=True)]
    whole.requires_grad_()
    torch.testing.assert_close(torch.cat(gradients),
                               torch.autograd.grad(functional.embedding(tokens, whole), whole, upstream)[0])
