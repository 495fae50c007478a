"""To fp8, both ways round: a tensor, or what a norm or a gate makes of one, without its bf16 form in between.

Hopper's fp8 matrix unit reads operands along the axis that is summed over. An activation [tokens, features]
is summed over features in the forward pass and over tokens in its weight's gradient, so it is written twice:
as it is, and transposed.

Scaling is per tensor: fp8 number = value x scale, held within the format's largest finite number (448 in
e4m3, 57344 in e5m2). Both formats' NaN is the byte 0x7F. e4m3 has no infinity, so that an infinity becomes
NaN, in e5m2 too: what was not finite stays visible through every product to the norm of the gradients.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron.pretrain.model.fused.quantize_reference import Target

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Quantized:
    """A matrix in fp8: value = fp8 number x inverse."""

    data: Tensor | None
    """fp8 [rows, columns], contiguous; None where only a weight's gradient is still to come."""
    transposed: Tensor | None
    """fp8 [columns, rows], contiguous; None where it is made later: of a rank's part of a matrix, once that is
    whole; of a norm, of attention's output and of an activation, in the backward pass."""
    inverse: Tensor
    """fp32 scalar: 1 / scale."""


@dataclass(frozen=True)
class Source:
    """Values to cast: those of a contiguous tensor, bf16, fp16 or fp32 [rows, columns], or made of them."""

    values: Tensor

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is cast."""
        return self.values.size(0), self.values.size(1)

    def into(self, target: Target) -> None:
        """Compute in fp32 and hand over, tile by tile."""
        _implementation(self.values).plain(self.values, target)


@dataclass(frozen=True)
class Normed(Source):
    """RMSNorm of the values [tokens, h]: values * inverse_rms * weight."""

    weight: Tensor
    """[h]."""
    inverse_rms: Tensor
    """fp32 [tokens], of the function `inverse_rms`."""

    def into(self, target: Target) -> None:
        _implementation(self.values).normed(self.values, self.weight, self.inverse_rms, target)


@dataclass(frozen=True)
class Gated(Source):
    """SwiGLU of the values [tokens, 2 f], gate and up side by side: silu(gate) * up [tokens, f]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.size(0), self.values.size(1) // 2

    def into(self, target: Target) -> None:
        _implementation(self.values).gated(self.values, target)


@dataclass(frozen=True)
class GatedGradient(Source):
    """The gradient of `Gated`'s values [tokens, 2 f]; a cast of it can remake the transpose that theirs left out."""

    gradient: Tensor
    """[tokens, f], contiguous: of the activated values."""
    activated: Tensor | None = None
    """e4m3 [f, tokens]: where the activated values go, as a cast with `activated_inverse` puts them."""
    activated_inverse: Tensor | None = None

    def into(self, target: Target) -> None:
        activated = None if target.scale is None else self.activated
        _implementation(self.values).gated_gradient(self.values, self.gradient, target, activated,
                                                    self.activated_inverse)


def quantize(source: Source, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None, *, rows: bool = True,
             columns: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """Cast a source to fp8: what is wanted of its `rows` [rows, columns] and its `columns` [columns, rows].

    One read, a write each. `scale` is an fp32 scalar on the device. `amax`, an fp32 scalar, is raised to the
    largest absolute value that was seen, before scaling.
    """
    height, width = source.shape
    data = torch.empty(height, width, dtype=dtype, device=scale.device) if rows else None
    transposed = torch.empty(width, height, dtype=dtype, device=scale.device) if columns else None
    source.into(Target(amax=amax, scale=scale, data=data, transposed=transposed))
    return data, transposed


def largest(source: Source) -> Tensor:
    """The largest absolute value of a source, an fp32 scalar on its device: NaN if there is one.

    A maximum does not depend on the order in which it is taken, so this is deterministic.
    """
    amax = torch.zeros((), dtype=torch.float32, device=source.values.device)
    source.into(Target(amax=amax))
    return amax


def inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    """[tokens, h] -> fp32 [tokens]: 1 / sqrt(mean of squares + eps).

    A pass of its own, ahead of `Normed`: a tile that is wide enough for a row's mean is too flat to write the
    transpose in whole lines of memory. The second read of 50 MB (8192 x 3072) finds most of them in the L2.
    """
    out = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
    _implementation(hidden).inverse_rms(hidden, eps, out)
    return out


def scale_of(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Current scaling: (scale, 1 / scale) that take `amax` to the format's largest number; 1 where amax is 0.

    The scale ends at 2^126, so that its inverse is a normal number. A NaN stays one.
    """
    # cuBLAS reads a scale only from an address that is a multiple of 16 bytes.
    scale, inverse = torch.empty(2, 4, dtype=torch.float32, device=amax.device)[:, 0].unbind()
    _implementation(amax).scale_of(amax, torch.finfo(dtype).max, scale, inverse)
    return scale, inverse


def transpose(data: Tensor) -> Tensor:
    """fp8 [rows, columns] -> the same bytes as [columns, rows], contiguous: for what was gathered in fp8."""
    out = torch.empty(data.size(1), data.size(0), dtype=data.dtype, device=data.device)
    _implementation(data).transpose(data, out)
    return out


def _implementation(values: Tensor) -> ModuleType:
    """Triton's kernels on a GPU, torch elsewhere; both have the same functions."""
    name = "quantize_kernels" if values.is_cuda else "quantize_reference"
    return importlib.import_module(f"megatron.pretrain.model.fused.{name}")
