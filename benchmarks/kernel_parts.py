"""What benchmarks/kernels.py knows of a part of a training step, and of the candidates that can do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from models import Shape
from torch import Tensor

CHECKED_ROWS = 64
Candidates = dict[str, Callable[[], Any]]
PACKAGES = {"quack": "quack-kernels", "flash_attn.cute": "flash-attn-4", "triton": "triton",
            "transformer_engine": "transformer-engine"}


@dataclass(frozen=True)
class Part:
    """Some work, its least cost, and who can do it.

    Each candidate returns tensors of the same meaning, of which `picked` takes the part that is compared with
    `reference`, computed in fp64. `fresh` comes before a check: it undoes what was computed in place.
    """

    name: str
    times: float
    """How often it is done in one step of the whole model."""
    flops: float
    bytes: float
    reference: Callable[[], Tensor]
    picked: Callable[[Any], Tensor]
    candidates: Candidates
    fresh: Callable[[], object] = lambda: None
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """For which model, how many tokens, where, and with how many of the tiles."""

    shape: Shape
    tokens: int
    device: torch.device
    all_tiles: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=self.device) * scale).bfloat16()

    def having(self, module: str, candidates: Candidates, left_out: list[str]) -> Candidates:
        """The candidates, where there is a GPU and their package for them; else a note in `left_out`."""
        if not self.on_gpu:
            left_out.append(f"{PACKAGES[module]}: needs a GPU")
        elif not _installed(module):
            left_out.append(f"{PACKAGES[module]}: not installed")
        else:
            return candidates
        return {}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def poisoned(like: Tensor, *size: int) -> Tensor:
    return torch.full(size, float("nan"), dtype=like.dtype, device=like.device)


def first_rows(out: Tensor) -> Tensor:
    return out[:CHECKED_ROWS]


def moved(*tensors: Tensor) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


class Lazy:
    """A candidate that is prepared at its first call: a package that fails then fails as this candidate."""

    def __init__(self, prepare: Callable[[], Callable[[], Any]]) -> None:
        self._prepare = prepare
        self._call: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._call is None:
            self._call = self._prepare()
        return self._call()
