"""Rows of tensors that lie in files, written to their places in other files, by several threads at once.

Each thread reads and writes through a small buffer of its own, so memory does not grow with the model.
Reading, writing and checksums leave the interpreter free for the other threads. Like `cp`, it does not wait
for the disk: a verification does, which reads back what it finds there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.pretrain.export.elements import ElementType, convert
from megatron.pretrain.export.stored import BUFFER_BYTES, OpenFiles

_MOST_THREADS = 4


class Source(Protocol):
    """Rows to be read: a `StoredTensor`, or rows that are made up."""

    dtype: ElementType

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""

    def read_rows(self, first: int, buffer: memoryview, files: OpenFiles) -> None:
        """Fill `buffer`, bytes of whole rows, with the rows from `first` on."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source from `start` to before `stop`."""

    source: Source
    start: int
    stop: int


@dataclass(frozen=True)
class Copy:
    """Rows, and the place in a file where they are to lie one after the other, as elements of `dtype`.

    `name` is what a sentence about them calls them. The file must exist.
    """

    name: str
    path: Path
    offset_bytes: int
    rows: tuple[Rows, ...]
    dtype: ElementType


@dataclass(frozen=True)
class Copied:
    """A copy that was made: its size, and the CRC-32 of what was written where that was wanted."""

    copy: Copy
    size_bytes: int
    crc32: int


def copy_all(copies: Sequence[Copy], *, checksums: bool) -> Iterator[Copied]:
    """Make the copies, and yield each when it is made; with their CRC-32 where `checksums` are wanted.

    Those that stand side by side in `copies` are made at once: best they are of different files, because a
    file system lets only one thread write to a file. Raises UserError for a source that cannot be read or
    converted, OSError for a target that cannot be written.
    """
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        for done in as_completed([pool.submit(_copy, one, checksums) for one in copies]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _copy(copy: Copy, with_checksum: bool) -> Copied:
    crc32, at = 0, copy.offset_bytes
    with copy.path.open("r+b", buffering=0) as file, OpenFiles() as files:
        for rows in copy.rows:
            for elements in _read(rows, files):
                written = memoryview(convert(elements, rows.source.dtype, copy.dtype, copy.name)).cast("B")
                if with_checksum:
                    crc32 = zlib.crc32(written, crc32)
                at += _write(file.fileno(), written, at)
    return Copied(copy, at - copy.offset_bytes, crc32)


def _read(rows: Rows, files: OpenFiles) -> Iterator[memoryview]:
    """The rows as bytes, some at a time, each in the memory of those before."""
    row_bytes = rows.source.row_bytes
    at_once = min(max(1, BUFFER_BYTES // row_bytes), rows.stop - rows.start)
    buffer = memoryview(bytearray(at_once * row_bytes))
    for first in range(rows.start, rows.stop, at_once):
        part = buffer[:min(at_once, rows.stop - first) * row_bytes]
        rows.source.read_rows(first, part, files)
        yield part


def _write(file: int, content: memoryview, offset_bytes: int) -> int:
    written_bytes = 0
    while written_bytes < len(content):
        written_bytes += os.pwrite(file, content[written_bytes:], offset_bytes + written_bytes)
    return written_bytes
