"""Conversions of elements against torch's, for every pattern of bits that 16 hold."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import BF16, ELEMENT_TYPES, FP16, FP32, ElementType, convert


def converted(tensor: torch.Tensor, target: ElementType) -> torch.Tensor:
    source = ELEMENT_TYPES[str(tensor.dtype).removeprefix("torch.")]
    made = convert(memoryview(tensor.view(torch.uint8).numpy()).cast("B"), source, target, "a tensor")
    return torch.frombuffer(bytearray(memoryview(made).cast("B")), dtype=target.of_torch)


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every number of 16 bits; of fp32, those and their neighbours, which have to be rounded."""
    every = torch.arange(-2**15, 2**15, dtype=torch.int16)
    if dtype != torch.float32:
        return every.view(dtype)
    upper = every.int() << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).view(-1).view(torch.float32)


@pytest.mark.parametrize(("source", "target"), list(itertools.product((BF16, FP16, FP32), repeat=2)),
                         ids=lambda dtype: dtype.name)
def test_every_number_becomes_what_torch_makes_of_it(source: ElementType, target: ElementType):
    tensor = numbers(source.of_torch)
    if target == FP16:
        tensor = tensor[~(tensor.float().abs() > 65504)]    # infinities too, which are as they were elsewhere
    made, expected = converted(tensor, target), tensor.to(target.of_torch)
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made.nan_to_num(1, 2, 3), expected.nan_to_num(1, 2, 3))
    assert torch.equal(made.signbit()[~made.isnan()], expected.signbit()[~expected.isnan()])


def test_what_fp16_cannot_hold_is_refused_and_infinity_is_not():
    with pytest.raises(UserError, match="a tensor holds 70000, and fp16 ends at 65504"):
        converted(torch.tensor([1.0, -7e4, torch.inf]), FP16)
    assert converted(torch.tensor([-torch.inf, torch.nan]), FP16)[0] == -torch.inf


def test_the_types_are_torchs():
    for name, dtype in ELEMENT_TYPES.items():
        assert dtype.of_torch.itemsize == dtype.size_bytes, name
