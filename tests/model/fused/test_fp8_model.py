"""Which layers are in fp8, and on which devices."""

from __future__ import annotations

import pytest
import torch

from megatron.pretrain.cli import parse
from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.model.build import _fp8_layers, _require_fp8

SHAPE = ("--num-layers 6 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 "
         "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --bf16").split()


def config_of(flags: str) -> RunConfig:
    return parse([*SHAPE, *flags.split()]).config


@pytest.mark.parametrize("flags, layers", [
    ("", []), ("--fp8", [0, 1, 2, 3, 4, 5]), ("--fp8 --first-last-layers-bf16", [1, 2, 3, 4]),
    ("--fp8 --num-layers-at-start-in-bf16 2", [0, 1, 2, 3, 4, 5]),
    ("--fp8 --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 0",
     [2, 3, 4, 5])])
def test_layers(flags: str, layers: list[int]) -> None:
    in_fp8 = _fp8_layers(config_of(flags))
    assert [layer for layer in range(6) if in_fp8(layer)] == layers


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="NVIDIA A100 has compute capability 8.0, and fp8 needs 8.9 or later"):
        _require_fp8(torch.device("cuda"))
    _require_fp8(torch.device("cpu"))
