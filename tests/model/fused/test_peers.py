"""Products that are cut by ranks, on two CPU processes; and on a machine of two GPUs or more (`pytest -m gpu`) that
collectives through peers' memory are those of NCCL.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.pretrain.model.fused.peers import _see_each_other, peer_memory

DRIVER = Path(__file__).with_name("drive_peers.py")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_peers_are_nccl() -> None:
    count = min(torch.cuda.device_count(), 4)
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
                          str(DRIVER)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "gather: equal, scatter_sum: equal" in ran.stdout


@pytest.mark.parametrize("flags", [
    (), ("--recompute-granularity", "selective", "--recompute-modules", "mlp"),
    ("--bf16", "--fp8", "--fp8-recipe", "tensorwise")], ids=["fp32", "recomputed", "fp8"])
def test_products_that_are_cut_are_those_that_are_not(flags: tuple[str, ...]) -> None:
    driver = DRIVER.with_name("drive_peer_products.py")
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          str(driver), *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "cut products: equal" in ran.stdout


def test_peers_are_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks a machine, of which a process may see fewer GPUs than there are."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} != {0, 5})
    assert _see_each_other([2, 3]) and _see_each_other([10, 11, 12, 13])
    assert not _see_each_other([7, 8]) and not _see_each_other([0, 5])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not _see_each_other([2, 3])


def test_without_a_group_there_are_no_peers() -> None:
    assert peer_memory(None) is None
