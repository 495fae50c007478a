"""Which scale a tensor is cast with: that of its own largest value, or of those that it had in past steps.

`tensorwise`, also called current scaling, looks at a tensor twice: for its largest value, and to cast it.
`delayed` casts at once, with the scale that the past steps' largest values ask for, and records this step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.pretrain.model.fused.quantize import Quantized, Source, largest, quantize, scale_of
from megatron.pretrain.model.fused.quantize_reference import LARGEST_SCALE

HISTORY = 1024
"""Steps that `delayed` looks back on, as Transformer Engine's DelayedScaling does by default."""


class Scaling(Protocol):
    """How one tensor of a layer is cast."""

    def quantize(self, source: Source, group: dist.ProcessGroup | None = None, *, rows: bool = True,
                 columns: bool = True) -> Quantized:
        """Its rows, its columns or both, with the inverse of the scale that was taken.

        With a group the source is its rank's part of a tensor: all take one scale, and nothing is transposed.
        """


@dataclass(frozen=True)
class CurrentScaling:
    """scale = largest number of the format / largest value of the tensor."""

    dtype: torch.dtype

    def quantize(self, source: Source, group: dist.ProcessGroup | None = None, *, rows: bool = True,
                 columns: bool = True) -> Quantized:
        scale, inverse = scale_of(_largest_of(source, group), self.dtype)
        return Quantized(*quantize(source, scale, self.dtype, rows=rows, columns=columns and group is None), inverse)


@dataclass(frozen=True)
class DelayedScaling:
    """scale = largest number of the format / largest value over the history."""

    history: AmaxHistory
    number: int
    dtype: torch.dtype

    def quantize(self, source: Source, group: dist.ProcessGroup | None = None, *, rows: bool = True,
                 columns: bool = True) -> Quantized:
        live, columns = self.history.live[self.number], columns and group is None
        if not self.history.begun:  # nothing is known yet: the first step looks at the tensor itself
            amax = _largest_of(source, group)
            live.copy_(torch.maximum(live, amax))
            scale, inverse = scale_of(amax, self.dtype)
            return Quantized(*quantize(source, scale, self.dtype, rows=rows, columns=columns), inverse)
        scale, inverse = self.history.scales[self.number], self.history.inverses[self.number]
        return Quantized(*quantize(source, scale, self.dtype, amax=live, rows=rows, columns=columns), inverse)


def _largest_of(source: Source, group: dist.ProcessGroup | None) -> Tensor:
    """The largest absolute value of a tensor, of which each rank of a group has a part."""
    amax = largest(source)
    if group is not None:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return amax


class AmaxHistory:
    """The largest values of many tensors over the past steps, and the scales that follow from them.

    As Transformer Engine's DelayedScaling with its defaults (margin 0, amax_compute_algo "max",
    transformer_engine/pytorch/fp8.py and common/recipe/delayed_scaling.cu): after each step the scale is
    format's largest number / largest of the history, and the history moves on by one. Deliberate differences:
    a value that is not finite is forgotten, rather than kept in the window for 1024 steps; and the first step
    scales by what it sees rather than by 1, which would flush small gradients to zero.

    All tensors share one history and one vector of scales, so that an update is a few kernels and one
    collective for a whole model, and never waits for the device. Scales follow from the history alone, which is
    what a checkpoint holds.
    """

    def __init__(self, formats: Sequence[torch.dtype], device: torch.device) -> None:
        self.begun = False
        """Whether a step has been recorded; before that the history is empty."""
        self.values = torch.zeros(len(formats), HISTORY, device=device)
        """fp32 [tensors, HISTORY]; column 0 is the step that runs, column 1 the one before."""
        self._largest = torch.tensor([torch.finfo(dtype).max for dtype in formats], device=device)
        # cuBLAS reads a scale only from an address that is a multiple of 16 bytes.
        self._scales, self._inverses = torch.ones(2, len(formats), 4, device=device)[..., 0]
        self.live: tuple[Tensor, ...] = self.values[:, 0].unbind()
        self.scales: tuple[Tensor, ...] = self._scales.unbind()
        self.inverses: tuple[Tensor, ...] = self._inverses.unbind()

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """After a step: join the largest values of the group's ranks, which then scale alike, and move on."""
        seen = self.values[:, 0].clone()
        if group is not None and group.size() > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
        self.values[:, 0] = torch.where(seen.isfinite(), seen, 0.0)
        self.values.copy_(self.values.roll(1, dims=1))
        self.values[:, 0] = 0
        self.resume()

    @torch.no_grad()
    def resume(self) -> None:
        """Take the scales from the history as it stands, such as one that was loaded into `values`."""
        amax = self.values[:, 1:].amax(dim=1)
        self._scales.copy_(torch.where(amax == 0, 1.0, (self._largest / amax).clamp(max=LARGEST_SCALE)))
        self._inverses.copy_(1 / self._scales)
        self.begun = True
