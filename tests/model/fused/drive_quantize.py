"""Run by test_quantize.py: the fp8 kernels in Triton's interpreter, without a GPU, against float64.

    python drive_quantize.py PART ...    # of SOURCES and OTHERS below
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from megatron.pretrain.model.fused import quantize, quantize_kernels, quantize_reference  # noqa: E402
from megatron.pretrain.model.fused.quantize import (  # noqa: E402
    E4M3, E5M2, Gated, GatedGradient, Normed, Source, inverse_rms, largest, scale_of, transpose)
from megatron.pretrain.model.fused.quantize_reference import Target  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 16), (20, 48), (132, 200), (128, 20)]
if DEVICE == "cuda":
    SHAPES.append((8192, 3072))
POISON = 0xA5


def convert(values: np.ndarray, source: tl.dtype, wanted: tl.dtype, rounding: object) -> np.ndarray:
    """The interpreter's own conversion to fp8 neither rounds to the nearest nor knows NaN: torch's does."""
    if wanted not in (tl.float8e4nv, tl.float8e5):
        return original(values, source, wanted, rounding)
    torch_dtype = E4M3 if wanted == tl.float8e4nv else E5M2
    return torch.from_numpy(values).to(torch_dtype).view(torch.uint8).numpy()


original, interpreter._convert_float = interpreter._convert_float, convert
quantize._implementation = lambda values: quantize_kernels


def values_of(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 2.0 ** torch.randint(-6, 3, (1, shape[-1]))).to(DEVICE, torch.bfloat16)


def plain(rows: int, columns: int) -> tuple[Source, Tensor]:
    values = values_of(rows, columns)
    return Source(values), values.double()


def normed(rows: int, columns: int) -> tuple[Source, Tensor]:
    values, weight = values_of(rows, columns), values_of(columns)
    exact = torch.rsqrt(values.double().square().mean(-1, keepdim=True) + 1e-5)
    inverse = inverse_rms(values, 1e-5)
    torch.testing.assert_close(inverse.double(), exact[:, 0], rtol=1e-5, atol=0)
    return Normed(values, weight, inverse), values.double() * exact * weight.double()


def gated(rows: int, columns: int) -> tuple[Source, Tensor]:
    values = values_of(rows, 2 * columns)
    gate, up = values.double().chunk(2, -1)
    return Gated(values), torch.nn.functional.silu(gate) * up


def gated_gradient(rows: int, columns: int) -> tuple[Source, Tensor]:
    values, upstream = values_of(rows, 2 * columns), values_of(rows, columns)
    exact = values.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    (gradient,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, exact, upstream.double())
    return GatedGradient(values, upstream), gradient


SOURCES = {"plain": plain, "normed": normed, "gated": gated, "gated_gradient": gated_gradient}


def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A poisoned matrix and the bytes that follow it, which nobody may write."""
    memory = torch.full((rows * columns + 256,), POISON, dtype=torch.uint8, device=DEVICE)
    return memory[:rows * columns].view(dtype).view(rows, columns), memory[rows * columns:]


def cast(source: Source, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(data, largest seen) of a cast, after everything that holds for any of them has been looked at."""
    rows, columns = source.shape
    (data, after), (transposed, behind) = guarded(rows, columns, dtype), guarded(columns, rows, dtype)
    amax = torch.zeros((), device=DEVICE)
    source.into(Target(amax=amax, scale=scale, data=data, transposed=transposed))
    assert (after == POISON).all() and (behind == POISON).all(), "written past the end"
    assert torch.equal(transposed.view(torch.uint8), data.view(torch.uint8).T), "the transpose differs"
    # A compiler may contract each form of a kernel to other fused multiply-adds: a last bit may differ.
    torch.testing.assert_close(amax, largest(source), rtol=1e-6, atol=0, equal_nan=True)
    again, _ = quantize.quantize(source, scale, dtype)
    alone, none = quantize.quantize(source, scale, dtype, columns=False)
    nothing, turned = quantize.quantize(source, scale, dtype, rows=False)
    assert none is None and nothing is None
    for form in (again, alone, turned.view(torch.uint8).T):
        differing = (form.view(torch.uint8) != data.view(torch.uint8)).double().mean()
        assert differing < (1e-4 if DEVICE == "cuda" else 1e-9)
    return data, amax


def check_activated() -> None:
    """What the gradient's cast remakes is what the activation's own cast would have transposed, and no more."""
    for rows, columns in SHAPES:
        halves, upstream = values_of(rows, 2 * columns), values_of(rows, columns)
        scale, inverse = scale_of(largest(Gated(halves)), E4M3)
        _, expected = quantize.quantize(Gated(halves), scale * 3, E4M3)
        out, after = guarded(columns, rows, E4M3)
        source = GatedGradient(halves, upstream, out, inverse / 3)
        assert largest(source).isfinite() and (out.view(torch.uint8) == POISON).all(), "written for the largest value"
        data, transposed = quantize.quantize(source, scale_of(largest(source), E5M2)[0], E5M2)
        plain_data, plain_transposed = quantize.quantize(
            GatedGradient(halves, upstream), scale_of(largest(source), E5M2)[0], E5M2)
        assert (after == POISON).all(), "written past the end"
        for ours, right in ((out, expected), (data, plain_data), (transposed, plain_transposed)):
            # 1 / (1 / scale) may be the scale's neighbour, and two forms of a kernel differ in a last bit.
            assert (ours.view(torch.uint8) != right.view(torch.uint8)).double().mean() < 1e-3


def check_source(name: str) -> None:
    for rows, columns in SHAPES:
        for dtype in (E4M3, E5M2):
            source, exact = SOURCES[name](rows, columns)
            scale, _ = scale_of(largest(source), dtype)
            for factor in (1.0, 3.0):  # what is past the largest number is held there
                data, amax = cast(source, scale * factor, dtype)
                torch.testing.assert_close(amax.double(), exact.abs().max(), rtol=1e-5, atol=0)
                scaled = exact * (scale * factor).double()
                nearest = quantize_reference.to_fp8(scaled.float(), dtype).double()
                excess = (data.double() - scaled).abs() - (nearest - scaled).abs()
                # Beside the rounding of fp32, of which silu' leaves more where its terms cancel.
                assert (excess <= 1e-5 * scaled.abs() + 1e-6 * scaled.abs().max()).all(), \
                    (rows, columns, dtype, excess.max())


def check_specials() -> None:
    values = torch.zeros(4, 16, dtype=torch.bfloat16, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    assert torch.equal(cast(Source(values), one, E4M3)[0].float(), values.float())
    values[0, :6] = torch.tensor([1e30, -1e30, 448, 464, 57344, 65536])
    for dtype, most in ((E4M3, 448.0), (E5M2, 57344.0)):
        data = cast(Source(values), one, dtype)[0]
        assert data[0, :3].tolist() == [most, -most, 448.0] and data[0, 4:6].tolist() == [most, most]
    values[1, 3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for dtype in (E4M3, E5M2):
        data, amax = cast(Source(values), one, dtype)
        assert data.isnan().sum() == 3 and data[1, 3:6].isnan().all(), "what is not finite is NaN"
        assert amax.isnan(), "a NaN is the largest of all"
    values[1, 5] = 0
    assert cast(Source(values), one, E4M3)[1] == torch.inf


def check_scales() -> None:
    for amax, dtype, wanted in ((2.0, E4M3, 224.0), (0.0, E4M3, 1.0), (7.0, E5M2, 8192.0),
                                (1e-40, E4M3, 2.0**126)):
        scale, inverse = scale_of(torch.tensor(amax, device=DEVICE), dtype)
        torch.testing.assert_close([scale.item(), inverse.item()], [wanted, 1 / wanted], rtol=1e-6, atol=0)
    scale, inverse = scale_of(torch.tensor(torch.nan, device=DEVICE), E4M3)
    assert scale.isnan() and inverse.isnan()


def check_transpose() -> None:
    for rows, columns in SHAPES:
        data = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).to(DEVICE).view(E4M3)
        assert torch.equal(transpose(data).view(torch.uint8), data.view(torch.uint8).T)


def check_lengths() -> None:
    """Lines that do not end with a word are refused before anything is written."""
    one = torch.ones((), device=DEVICE)
    halves, upstream = values_of(4, 12), values_of(4, 6)
    for source in (Source(values_of(4, 18)), Source(values_of(18, 4)), GatedGradient(halves, upstream)):
        try:
            quantize.quantize(source, one, E4M3)
        except ValueError as error:
            assert "multiple of 4 numbers" in str(error)
        else:
            raise AssertionError(f"{source.shape} was cast")


OTHERS = {"activated": check_activated, "lengths": check_lengths, "specials": check_specials,
          "scales": check_scales, "transpose": check_transpose}
torch.manual_seed(0)
for part in sys.argv[1:]:
    check_source(part) if part in SOURCES else OTHERS[part]()
    print(f"{part}: equal")
