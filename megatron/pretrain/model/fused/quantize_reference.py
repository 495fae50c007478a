"""What the fp8 kernels compute, in torch: the path of a CPU, and what the kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SCALE = 2.0**126
"""Its inverse is the smallest normal number."""


@dataclass(frozen=True)
class Target:
    """Where the values of a source [rows, columns] go; a part that is None is not wanted."""

    amax: Tensor | None = None
    """fp32 scalar, raised to the largest absolute value before scaling."""
    scale: Tensor | None = None
    """fp32 scalar that values are multiplied by, with `data` or `transposed`."""
    data: Tensor | None = None
    """fp8 [rows, columns]."""
    transposed: Tensor | None = None
    """fp8 [columns, rows]."""

    @property
    def dtype(self) -> torch.dtype:
        """The format of what is written."""
        return (self.data if self.data is not None else self.transposed).dtype


def plain(values: Tensor, target: Target) -> None:
    _emit(values.float(), target)


def normed(hidden: Tensor, weight: Tensor, inverse_rms: Tensor, target: Target) -> None:
    _emit(hidden.float() * inverse_rms[:, None] * weight.float(), target)


def gated(halves: Tensor, target: Target) -> None:
    gate, up = halves.float().chunk(2, -1)
    _emit(gate * torch.sigmoid(gate) * up, target)


def gated_gradient(halves: Tensor, gradient: Tensor, target: Target, activated: Tensor | None,
                   activated_inverse: Tensor | None) -> None:
    gate, up = halves.float().chunk(2, -1)
    sigmoid, upstream = torch.sigmoid(gate), gradient.float()
    if activated is not None:
        transpose(to_fp8(gate * sigmoid * up * (1 / activated_inverse), activated.dtype), activated)
    d_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    _emit(torch.cat([d_gate, upstream * gate * sigmoid], -1), target)


def inverse_rms(hidden: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(torch.rsqrt(hidden.float().square().mean(-1) + eps))


def scale_of(amax: Tensor, largest: float, scale: Tensor, inverse: Tensor) -> None:
    scale.copy_(torch.where(amax == 0, 1.0, (largest / amax).clamp(max=LARGEST_SCALE)))
    inverse.copy_(1 / scale)


def transpose(data: Tensor, out: Tensor) -> None:
    out.view(torch.uint8).copy_(data.view(torch.uint8).T)


def to_fp8(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 -> fp8, to the nearest, ties to even, held within the finite numbers; infinities are NaN."""
    largest = torch.finfo(dtype).max
    return torch.where(scaled.isfinite(), scaled.clamp(-largest, largest), torch.nan).to(dtype)


def _emit(values: Tensor, target: Target) -> None:
    if target.amax is not None and values.numel():
        target.amax.copy_(torch.maximum(target.amax, values.abs().max()))
    if target.scale is not None:
        quantized = to_fp8(values * target.scale, target.dtype)
        if target.data is not None:
            target.data.copy_(quantized)
        if target.transposed is not None:
            transpose(quantized, target.transposed)
