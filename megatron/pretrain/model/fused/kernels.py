"""Which kernel does which part of a fused layer, by what is installed and what it was measured to be good at."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, fields
from functools import cache

import torch

HOPPER = (9, 0)
CHANGED_FLASH_ATTENTION = "4.0.0b36"
"""The flash-attn-4 whose kernel `attention_backward_kernel.py` changes from within."""
PROJECT_BACKWARD_HEAD_DIMS = (192, 256)
"""Of heads that `attention_backward_kernel.py` is written for."""
FLASH_BACKWARD_HEAD_DIM = 192
"""For wider heads flash-attn-4's own backward pass was measured to be slower than cuDNN's on an H200."""
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


def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int = 0, *,
                deterministic: bool = False) -> Kernels:
    """The fastest kernels that run on this device in this precision.

    quack's products and flash-attn-4 are written for Hopper and later and for 16-bit numbers. `head_dim` and
    `deterministic` matter to attention's backward pass alone.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Kernels()
    modern = torch.cuda.get_device_capability(device) >= HOPPER
    triton = "triton" if installed("triton") else "torch"
    quack = "quack" if modern and installed("quack") else "torch"
    flash = modern and installed("flash_attn.cute")
    return Kernels(gate=quack, norm=quack, rotary=triton, attention="flash-attn-4" if flash else "torch",
                   attention_backward=_attention_backward(device, head_dim, deterministic) if flash else "torch",
                   loss=triton)


def _attention_backward(device: torch.device, head_dim: int, deterministic: bool) -> str:
    """The fastest backward pass; flash-attn-4 alone promises the same bits every time."""
    if deterministic:
        return "flash-attn-4"
    if project_backward_is_for(device, head_dim) and installed_flash_attention() == CHANGED_FLASH_ATTENTION:
        return "project"
    return "cuDNN" if head_dim > FLASH_BACKWARD_HEAD_DIM else "flash-attn-4"


def project_backward_is_for(device: torch.device, head_dim: int) -> bool:
    """Whether the project's own backward pass is written for such heads on this GPU."""
    return head_dim in PROJECT_BACKWARD_HEAD_DIMS and torch.cuda.get_device_capability(device) == HOPPER


def installed_flash_attention() -> str:
    """The version of flash-attn-4."""
    return importlib.metadata.version("flash-attn-4")


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
