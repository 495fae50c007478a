"""The casts to fp8: torch's against float64, Triton's in its interpreter (or on a GPU) against both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.pretrain.model.fused.quantize import (
    E4M3, E5M2, Gated, GatedGradient, Normed, Source, inverse_rms, largest, quantize, scale_of, transpose)
from megatron.pretrain.model.fused.quantize_reference import to_fp8

DRIVER = Path(__file__).with_name("drive_quantize.py")
PARTS = (("plain", "specials", "scales", "lengths", "transpose"), ("normed", "gated", "gated_gradient", "activated"))


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_kernels(where: str, parts: tuple[str, ...]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if (where == "gpu") != torch.cuda.is_available():
        pytest.skip("needs a GPU" if where == "gpu" else "here the kernels run on the GPU")
    ran = subprocess.run([sys.executable, "-W", "ignore::RuntimeWarning", str(DRIVER), *parts], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert ran.stdout.split("\n")[:-1] == [f"{part}: equal" for part in parts]


def finite_numbers(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return every[every.isfinite()]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_nearest_number_is_taken(dtype: torch.dtype) -> None:
    numbers = finite_numbers(dtype)
    values = torch.cat([torch.randn(500) * 2.0 ** torch.randint(-16, 16, (500,)), numbers.float()])
    held = values.double().clamp(-numbers.max(), numbers.max())
    nearest = (held[:, None] - numbers).abs().amin(1)
    assert torch.equal((to_fp8(values, dtype).double() - held).abs(), nearest)
    tie = torch.tensor([17.0, 19.0]) if dtype == E4M3 else torch.tensor([9.0, 11.0])
    assert to_fp8(tie, dtype).tolist() == ([16.0, 20.0] if dtype == E4M3 else [8.0, 12.0]), "ties to even"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_is_nan(dtype: torch.dtype) -> None:
    special = to_fp8(torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38]), dtype)
    assert special[:3].isnan().all() and (special[:3].view(torch.uint8) & 0x7F == 0x7F).all()
    assert special[3:].tolist() == [torch.finfo(dtype).max, -torch.finfo(dtype).max]


def test_sources_are_their_formulas() -> None:
    torch.manual_seed(0)
    halves, gradient, weight = torch.randn(17, 96), torch.randn(17, 48), torch.rand(96)
    exact = halves.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    activated = torch.nn.functional.silu(gate) * up
    (d_halves,) = torch.autograd.grad(activated, exact, gradient.double())
    norm = torch.nn.functional.rms_norm(halves.double(), (96,), weight.double(), 1e-5)
    one = torch.ones(())
    for source, values in ((Source(halves), halves), (Gated(halves), activated),
                           (GatedGradient(halves, gradient), d_halves),
                           (Normed(halves, weight, inverse_rms(halves, 1e-5)), norm)):
        values = values.detach().double()
        data, transposed = quantize(source, one, E5M2)
        assert source.shape == values.shape == data.shape
        torch.testing.assert_close(data.double(), values, rtol=0.126, atol=1e-4)
        assert torch.equal(transpose(data).view(torch.uint8), transposed.view(torch.uint8))
        torch.testing.assert_close(largest(source).double(), values.abs().max(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("amax, wanted", [(2.0, 224.0), (0.0, 1.0), (448.0, 1.0), (1e-40, 2.0**126)])
def test_current_scale(amax: float, wanted: float) -> None:
    scale, inverse = scale_of(torch.tensor(amax), E4M3)
    assert (scale.item(), inverse.item()) == (wanted, torch.tensor(1 / wanted).item())
    assert scale_of(torch.tensor(torch.nan), E4M3)[0].isnan()


def test_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match="values must be contiguous"):
        Source(torch.zeros(4, 6).T)
