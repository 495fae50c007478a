"""A model's fp8: which layers are in it, and what is kept and moved on from step to step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron.pretrain.model.fused.fp8_linear import Casts, Fp8ColumnLinear, Fp8RowLinear
from megatron.pretrain.model.fused.quantize import E4M3, E5M2
from megatron.pretrain.model.fused.scaling import AmaxHistory, CurrentScaling, DelayedScaling

FORMATS = {"weight": E4M3, "inputs": E4M3, "gradient": E5M2}
"""Of a linear layer's tensors: precision forward, range backward (what Megatron-LM calls hybrid)."""


class Fp8State:
    """The casts of a model chunk's fp8 layers and, with the delayed recipe, their history.

    A layer's part of the history is its linear modules' weight, inputs and gradient, in the modules' order.
    """

    def __init__(self, layers: Iterable[torch.nn.Module], recipe: str, device: torch.device) -> None:
        linears = {layer.layer_number: _linears(layer) for layer in layers}
        self.layer_numbers = [number for number, parts in linears.items() if parts]
        """Of the layers that are in fp8, from 1, over all pipeline stages."""
        self._linears = [part for parts in linears.values() for part in parts]
        self.history = AmaxHistory(list(FORMATS.values()) * len(self._linears), device) \
            if recipe == "delayed" else None
        for place, part in enumerate(self._linears):
            part.casts = self._casts(part, place * len(FORMATS))

    def begin_step(self) -> None:
        """Before a step's first micro-batch, and before an evaluation: weights may have changed."""
        for part in self._linears:
            part.casts.forget()

    def end_step(self, group: dist.ProcessGroup) -> None:
        """After an optimizer step; `group` is the ranks that hold the same layers."""
        if self.history is not None:
            self.history.update(group)

    def layer_histories(self) -> dict[int, Tensor]:
        """Each fp8 layer's part of the history [tensors, HISTORY], by the layer's number, to save and load."""
        if self.history is None or not self.layer_numbers:
            return {}
        return dict(zip(self.layer_numbers, self.history.values.chunk(len(self.layer_numbers)), strict=True))

    def resume(self) -> None:
        """After the histories were loaded."""
        if self.history is not None:
            self.history.resume()

    def _casts(self, part: Fp8ColumnLinear | Fp8RowLinear, first: int) -> Casts:
        if self.history is None:
            scalings = {name: CurrentScaling(dtype) for name, dtype in FORMATS.items()}
        else:
            scalings = {name: DelayedScaling(self.history, first + offset, dtype)
                        for offset, (name, dtype) in enumerate(FORMATS.items())}
        return Casts(part.weight, weight_scaling=scalings["weight"], inputs=scalings["inputs"],
                     gradient=scalings["gradient"])


def fp8_states(chunks: Iterable[torch.nn.Module]) -> list[Fp8State]:
    """Of those model chunks, wrapped or not, that have one."""
    found = (getattr(unwrap_model(chunk), "fp8", None) for chunk in chunks)
    return [state for state in found if state is not None]


def _linears(layer: torch.nn.Module) -> list[Fp8ColumnLinear | Fp8RowLinear]:
    return [part for part in layer.modules() if isinstance(part, Fp8ColumnLinear | Fp8RowLinear)]
