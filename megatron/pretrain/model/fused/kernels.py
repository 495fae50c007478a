"""Which kernel does which part of a fused layer, by what is installed and what it was measured to be good at."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, fields
from functools import cache

import torch

HOPPER = (9, 0)
CHANGED_FLASH_ATTENTION = "4.0.0b36"
"""The flash-attn-4 whose kernel `attention_backward.py` changes from within."""
PACKAGES = {"quack": "quack-kernels", "flash_attn.cute": "flash-attn-4", "triton": "triton"}


@dataclass(frozen=True)
class Kernels:
    """The implementation of each part; "torch" runs anywhere and is what the others are tested against."""

    gate: str = "torch"
    norm: str = "torch"
    rotary: str = "torch"
    attention: str = "torch"
    attention_backward: str = "torch"
    loss: str = "torch"

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that run on this device in this precision.

    quack's products and flash-attn-4 are written for Hopper and later and for 16-bit numbers.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Kernels()
    modern = torch.cuda.get_device_capability(device) >= HOPPER
    triton = "triton" if installed("triton") else "torch"
    quack = "quack" if modern and installed("quack") else "torch"
    flash = "flash-attn-4" if modern and installed("flash_attn.cute") else "torch"
    backward = "project" if flash == "flash-attn-4" and _project_backward_fits(device) else flash
    return Kernels(gate=quack, norm=quack, rotary=triton, attention=flash, attention_backward=backward, loss=triton)


def _project_backward_fits(device: torch.device) -> bool:
    return (torch.cuda.get_device_capability(device) == HOPPER
            and importlib.metadata.version("flash-attn-4") == CHANGED_FLASH_ATTENTION)


def missing_packages() -> list[str]:
    """The pip names of what the fast kernels need and this environment lacks."""
    return [name for module, name in PACKAGES.items() if not installed(module)]


@cache
def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is not there
        return False
