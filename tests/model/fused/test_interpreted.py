"""Triton's kernels in its interpreter, on the CPU, against torch's forms of the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

DRIVER = Path(__file__).with_name("drive_triton.py")


@pytest.mark.parametrize("part", ["adamw", "rotary", "sums", "rows", "loss"])
def test_kernel_is_its_torch_form(part: str) -> None:
    ran = subprocess.run([sys.executable, str(DRIVER), part], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert f"{part}: equal" in ran.stdout
