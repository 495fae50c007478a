"""What a benchmark's figures depend on beside the code: versions, device, driver, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shutil
import subprocess

PACKAGES = ("torch", "megatron-core", "transformer-engine", "quack-kernels", "flash-attn-4", "triton")


def versions() -> dict[str, str]:
    """Versions of the packages that are installed, and of CUDA and cuDNN where torch has them."""
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["cuDNN"] = _cudnn_version()
    return found


def _cudnn_version() -> str:
    import torch

    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another package has loaded another cuDNN than torch was built with
        return str(error).partition(". ")[0]


def machine() -> dict[str, str]:
    """The day, the GPUs' driver and the load of the machine. Imports nothing heavy."""
    return {"date": datetime.date.today().isoformat(), "driver": _driver(),
            "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                           capture_output=True, timeout=60)
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else "unknown"


def as_line(facts: dict[str, str]) -> str:
    """`name value, name value, ...`"""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
