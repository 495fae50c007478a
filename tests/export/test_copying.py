"""Rows from file to file: whatever way they were cut, converted on the way, and from files that shrink."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.copying import Copy, Rows, copy_all
from megatron.pretrain.export.elements import BF16, FP32, ElementType
from megatron.pretrain.export.padding import MeanRow
from megatron.pretrain.export.stored import BUFFER_BYTES, Block, StoredTensor, checksum, stored_tensor

WHOLE = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))    # several buffers of fp32
WIDTH = WHOLE.shape[1] * 4


def store(path: Path, rows: list[int], columns: list[int]) -> StoredTensor:
    """WHOLE in pieces of so many rows and columns, one after the other in a file."""
    blocks, at, row = [], 0, 0
    with path.open("wb") as file:
        for bands in WHOLE.split(rows):
            column = 0
            for piece in bands.split(columns, dim=1):
                file.write(piece.contiguous().numpy().tobytes())
                blocks.append(Block(path, at, row, len(piece), piece.shape[1] * 4, column * 4))
                at, column = file.tell(), column + piece.shape[1]
            row += len(bands)
    return stored_tensor(WHOLE.shape, FP32, reversed(blocks))


def copy(rows: tuple[Rows, ...], target: Path, dtype: ElementType = FP32, at: int = 0) -> int:
    target.touch()
    copied, = copy_all([Copy("a tensor", target, at, rows, dtype)], checksums=True)
    assert copied.size_bytes == target.stat().st_size - at
    return copied.crc32


@pytest.mark.parametrize("rows", [[700], [350, 350], [1, 699]])
@pytest.mark.parametrize("columns", [[1000], [500, 500], [999, 1], [250] * 4])
def test_any_cut_gives_the_whole(rows: list[int], columns: list[int], tmp_path):
    assert WHOLE.nbytes > 3 * BUFFER_BYTES
    tensor = store(tmp_path / "pieces", rows, columns)
    assert torch.equal(tensor.load(), WHOLE)
    crc32 = copy((Rows(tensor, 600, 700), Rows(tensor, 0, 600)), tmp_path / "turned", at=100)
    turned = torch.cat([WHOLE[600:], WHOLE[:600]]).numpy().tobytes()
    assert (tmp_path / "turned").read_bytes() == bytes(100) + turned
    assert crc32 == zlib.crc32(turned) == checksum(tmp_path / "turned", 100, len(turned))


def test_rows_are_converted_on_the_way(tmp_path):
    tensor = store(tmp_path / "pieces", [350, 350], [500, 500])
    copy((Rows(tensor, 0, 700),), tmp_path / "bf16", BF16)
    assert (tmp_path / "bf16").read_bytes() == WHOLE.bfloat16().view(torch.int16).numpy().tobytes()


def test_padding_is_the_mean_row(tmp_path):
    tensor = store(tmp_path / "pieces", [700], [1000])
    copy((Rows(MeanRow(tensor), 0, 3),), tmp_path / "mean")
    means = torch.frombuffer(bytearray((tmp_path / "mean").read_bytes()), dtype=torch.float32).view(3, 1000)
    assert torch.allclose(means, WHOLE.mean(dim=0).expand(3, -1), atol=1e-7)


@pytest.mark.parametrize("blocks", [
    [],
    [(0, 699, WIDTH, 0)],
    [(0, 350, WIDTH, 0), (351, 349, WIDTH, 0)],
    [(0, 400, WIDTH, 0), (350, 350, WIDTH, 0)],
    [(0, 700, WIDTH - 4, 0)],
    [(0, 700, WIDTH // 2, 0), (0, 699, WIDTH // 2, WIDTH // 2)],
])
def test_parts_that_are_not_the_whole_are_refused(blocks, tmp_path):
    with pytest.raises(ValueError, match="the parts"):
        stored_tensor(WHOLE.shape, FP32, [
            Block(tmp_path, 0, row, rows, row_bytes, column) for row, rows, row_bytes, column in blocks])


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path):
    """A mapping of it would end the process by a signal, without a word."""
    tensor = store(tmp_path / "pieces", [700], [1000])
    os.truncate(tmp_path / "pieces", 650 * WIDTH)
    with pytest.raises(UserError, match=r"pieces ends at byte 2,600,000, where weights should lie"):
        copy((Rows(tensor, 0, 700),), tmp_path / "target")
    (tmp_path / "pieces").unlink()
    with pytest.raises(UserError, match="pieces cannot be read at byte 0: No such file"):
        copy((Rows(tensor, 0, 700),), tmp_path / "target")


MANY_ROWS = """
import resource, sys
from pathlib import Path
from megatron.pretrain.export.copying import Copy, Rows, copy_all
from megatron.pretrain.export.elements import BF16, FP32
from megatron.pretrain.export.stored import Block, stored_tensor

def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

source, target = map(Path, sys.argv[1:])
halves = [Block(source, half * 10**8, 0, 25_000, 4_000, half * 4_000) for half in range(2)]
tensor = stored_tensor((25_000, 2_000), FP32, halves)
before_kb = peak_kb()
copied, = copy_all([Copy("a tensor", target, 0, (Rows(tensor, 0, 25_000),), BF16)], checksums=True)
assert copied.size_bytes == 10**8
assert peak_kb() - before_kb < 16_000, f"{peak_kb() - before_kb} kB more"
assert "torch" not in sys.modules
"""


def test_memory_does_not_grow_with_the_tensor(run_tool, tmp_path):
    (tmp_path / "source").touch()
    os.truncate(tmp_path / "source", 2 * 10**8)    # zeros that take no disk
    (tmp_path / "target").touch()
    outcome = run_tool("-c", MANY_ROWS, tmp_path / "source", tmp_path / "target")
    assert outcome.returncode == 0, outcome.stderr
