"""The linear layers outside tensor parallelism: values and gradients for inputs of any strides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from megatron.pretrain.model.fused.gate import TorchGate
from megatron.pretrain.model.fused.linear import Linear, _RowLinear


@pytest.mark.parametrize("flags", [(), ("--fp8",)], ids=["bf16", "fp8"])
def test_every_weight_is_waited_for_before_it_is_used(flags: tuple[str, ...], run_tool) -> None:
    """As --overlap-param-gather needs; what the forward pass of no module uses is not gathered in time."""
    said = run_tool(Path(__file__).with_name("drive_hooks.py"), *flags, env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr[-2000:]
    assert "waited for 15 weights" in said.stdout


def strided(length: int, batch: int, width: int) -> torch.Tensor:
    """[s, b, width] over memory in [b, s, width] order, as some attention kernels leave it."""
    return torch.randn(batch, length, width).transpose(0, 1).requires_grad_()


def test_a_row_linear_layer() -> None:
    inputs, residual, weight = strided(6, 2, 16), strided(6, 2, 8), Parameter(torch.randn(8, 16))
    upstream = torch.randn(6, 2, 8)
    exact = residual + inputs @ weight.T
    wanted = torch.autograd.grad(exact, [inputs, residual, weight], upstream)
    out = _RowLinear.apply(inputs, residual, weight, None, False, TorchGate().add_product)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(torch.autograd.grad(out, [inputs, residual, weight], upstream), wanted)


def test_a_column_linear_layer() -> None:
    inputs, weight, upstream = strided(6, 2, 16), Parameter(torch.randn(8, 16)), torch.randn(6, 2, 8)
    exact = inputs @ weight.T
    out = Linear.apply(inputs, weight, None, False)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(torch.autograd.grad(out, [inputs, weight], upstream),
                               torch.autograd.grad(exact, [inputs, weight], upstream))
