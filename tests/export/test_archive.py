"""What is written here as torch.save writes it: torch and zipfile read it, whatever tensor it is."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
import zlib

import pytest
import torch

from megatron.pretrain.export.archive import TensorArchive, values_archive
from megatron.pretrain.export.elements import ELEMENT_TYPES
from megatron.pretrain.export.pickles import Call, Made, Named, pickled


@pytest.mark.parametrize("tensor", [
    torch.arange(6, dtype=torch.float32).view(2, 3), torch.zeros(1, 40, 7, dtype=torch.bfloat16),
    torch.ones(300, dtype=torch.float16), torch.arange(70000, dtype=torch.int64)],
    ids=lambda one: str(one.dtype))
def test_torch_reads_the_tensor(tensor: torch.Tensor, tmp_path):
    archive = TensorArchive(tuple(tensor.shape), ELEMENT_TYPES[str(tensor.dtype).removeprefix("torch.")])
    elements = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    crc32 = zlib.crc32(elements)
    head = archive.head(crc32)
    assert len(head) == len(archive.head()) and len(head) % 64 == 0
    (tmp_path / "tensor.pt").write_bytes(head + elements + archive.tail(crc32))
    for way in ({}, {"weights_only": False}, {"mmap": True}):
        assert torch.equal(torch.load(tmp_path / "tensor.pt", **way), tensor)
    with zipfile.ZipFile(tmp_path / "tensor.pt") as read:
        assert read.testzip() is None
        assert read.getinfo("archive/data/0").CRC == crc32


def test_torch_reads_values():
    values = {"args": argparse.Namespace(layers=3, rate=1e-4), "iteration": 7, "none": None}
    assert torch.load(io.BytesIO(values_archive(values)), weights_only=False) == values


def test_a_pickle_gives_back_what_it_was_made_of():
    value = {"numbers": [0, 1, -1, 127, 128, -129, 2**40, -2**63], "text": "ü\n", 3: (None, True, False, ())}
    assert pickle.loads(pickled(value)) == value
    made = pickle.loads(pickled({
        Call(Named("fractions", "Fraction"), ("1/3",)): Made(Named("argparse", "Namespace"), {"a": 1})}))
    (key, space), = made.items()
    assert (3 * key, space) == (1, argparse.Namespace(a=1))
    with pytest.raises(TypeError, match="float is not pickled here"):
        pickled(1.0)
