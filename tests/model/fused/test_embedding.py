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
    tokens = torch.randint(0, vocabulary, (count,), device=device).sort(descending=True).values.roll(count // 3)
    rows = torch.randn(count, 16, device=device).bfloat16()
    start = torch.randn(vocabulary, 16, device=device)
    total = start.clone()
    add_rows(total, tokens, rows)
    exact = start.double().index_add(0, tokens, rows.double())
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(vocabulary, dtype=torch.bool, device=device).index_fill(0, tokens, False)
    assert torch.equal(total[untouched], start[untouched])


@pytest.mark.parametrize("device", DEVICES)
def test_lookup(device: str) -> None:
    tokens = torch.tensor([[3, 0, 3], [1, 3, 0]], device=device)
    weight = Parameter(torch.randn(5, 8, device=device))
    upstream = torch.randn(2, 3, 8, device=device)
    (exact,) = torch.autograd.grad(functional.embedding(tokens, weight), weight, upstream)
    out = _Lookup.apply(tokens, weight)
    assert torch.equal(out, functional.embedding(tokens, weight))
    torch.testing.assert_close(torch.autograd.grad(out, weight, upstream)[0], exact)
    weight.main_grad = torch.ones(5, 8, device=device)
    _Lookup.apply(tokens, weight).backward(upstream)
    torch.testing.assert_close(weight.main_grad, exact + 1)
    assert weight.grad_added_to_main_grad
