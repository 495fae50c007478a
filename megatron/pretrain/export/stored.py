"""A tensor as files hold it: where its rows lie, read some rows at a time into memory that is used again.

Files are read and not mapped: reading costs one copy, which stays in the processor's cache, and no page
faults; and of a file that shrinks meanwhile it gives a sentence, where a mapping ends the process.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import ElementType

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 2**19
"""What is read at a time: it stays in a core's own cache until it is written."""

_MOST_PARTS = 1024    # of one preadv (IOV_MAX)


class OpenFiles:
    """Files to be read from, each opened once and closed at the end of the `with`."""

    def __init__(self) -> None:
        self._numbers: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers.values():
            os.close(number)

    def read(self, path: Path, offset_bytes: int, parts: Sequence[memoryview]) -> None:
        """Fill `parts`, one after the other, with what lies in the file from `offset_bytes` on.

        Raises UserError where the file cannot be read or ends too early.
        """
        waiting = list(parts)
        try:
            if path not in self._numbers:
                self._numbers[path] = os.open(path, os.O_RDONLY)
            while waiting:
                got_bytes = os.preadv(self._numbers[path], waiting[:_MOST_PARTS], offset_bytes)
                if not got_bytes:
                    raise UserError(f"{path} ends at byte {offset_bytes:,}, where weights should lie: it was "
                                    "cut short while it was read")
                offset_bytes += got_bytes
                waiting = _after(waiting, got_bytes)
        except OSError as problem:
            raise UserError(f"{path} cannot be read at byte {offset_bytes:,}: {problem.strerror}") from None


def _after(parts: Sequence[memoryview], got_bytes: int) -> list[memoryview]:
    """What of `parts` is not filled yet by the first `got_bytes`."""
    for number, part in enumerate(parts):
        if got_bytes < len(part):
            return [part[got_bytes:], *parts[number + 1:]]
        got_bytes -= len(part)
    return []


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor, or some columns of some rows, one row after the other in a file.

    `row` is the first one's place in the tensor, `column_bytes` where in the tensor's rows they begin.
    """

    path: Path
    offset_bytes: int
    row: int
    rows: int
    row_bytes: int
    column_bytes: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files: blocks that together are all of it. Make one with `stored_tensor`."""

    shape: tuple[int, ...]
    dtype: ElementType
    blocks: tuple[Block, ...]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row; a vector's rows are its elements."""
        return math.prod(self.shape[1:]) * self.dtype.size_bytes

    def read_rows(self, first: int, buffer: memoryview, files: OpenFiles) -> None:
        """Fill `buffer`, bytes of whole rows, with the rows from `first` on. Raises UserError like `files`."""
        end = first + len(buffer) // self.row_bytes
        for block in self.blocks:
            low, high = max(first, block.row), min(end, block.row + block.rows)
            if low >= high:
                continue
            parts = [buffer[(low - first) * self.row_bytes:(high - first) * self.row_bytes]]
            if block.row_bytes < self.row_bytes:
                starts = range(block.column_bytes, len(parts[0]), self.row_bytes)
                parts = [parts[0][start:start + block.row_bytes] for start in starts]
            files.read(block.path, block.offset_bytes + (low - block.row) * block.row_bytes, parts)

    def load(self) -> torch.Tensor:
        """The whole tensor in memory, for those that compute with it."""
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype.of_torch)
        with OpenFiles() as files:
            self.read_rows(0, memoryview(tensor.view(-1).view(torch.uint8).numpy()), files)
        return tensor


def stored_tensor(shape: Sequence[int], dtype: ElementType, blocks: Iterable[Block]) -> StoredTensor:
    """A tensor that `blocks` make up; of copies of the whole, one is taken. Raises ValueError where they
    leave something out or overlap."""
    rows, row_bytes = shape[0], math.prod(shape[1:]) * dtype.size_bytes
    parts = sorted(blocks, key=lambda block: (block.row, block.column_bytes))
    whole = next((block for block in parts if (block.rows, block.row_bytes) == (rows, row_bytes)), None)
    if whole is not None:
        return StoredTensor(tuple(shape), dtype, (whole,))
    reached_row = 0
    for row, group in itertools.groupby(parts, key=lambda block: block.row):
        side_by_side = list(group)
        edges_bytes = itertools.accumulate((block.row_bytes for block in side_by_side), initial=0)
        if row != reached_row or len({block.rows for block in side_by_side}) > 1 or list(edges_bytes) != [
                *(block.column_bytes for block in side_by_side), row_bytes]:
            raise ValueError("the parts do not fit together")
        reached_row += side_by_side[0].rows
    if reached_row != rows:
        raise ValueError(f"the parts end at row {reached_row} of {rows}")
    return StoredTensor(tuple(shape), dtype, tuple(parts))


def checksum(path: Path, offset_bytes: int, size_bytes: int) -> int:
    """CRC-32 of a part of a file. Raises UserError where it cannot be read."""
    crc32, buffer = 0, memoryview(bytearray(min(BUFFER_BYTES, size_bytes)))
    with OpenFiles() as files:
        for at in range(0, size_bytes, BUFFER_BYTES):
            part = buffer[:min(BUFFER_BYTES, size_bytes - at)]
            files.read(path, offset_bytes + at, [part])
            crc32 = zlib.crc32(part, crc32)
    return crc32
