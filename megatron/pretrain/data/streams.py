"""Inputs that can only be read from the beginning: standard input, .gz and .zst."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from megatron.pretrain.data.documents import Chunk, reading
from megatron.pretrain.data.inputs import Input
from megatron.pretrain.errors import UserError

BLOCK_BYTES = 1 << 20
PACKED_BLOCK_BYTES = 1 << 12
"""Unpacked at once. A block of zeros grows a thousandfold in .gz and thirty-thousandfold in .zst."""


def cut_stream(source: Input, chunk_bytes: int, from_byte: int) -> Iterator[tuple[Chunk, int]]:
    """The input as chunks that carry their bytes, each with the bytes read from the disk for it.

    from_byte: where to begin, counted in unpacked bytes; what is before it is read and dropped.
    """
    before: tuple[Chunk, int] | None = None
    for chunk, disk_bytes in _cut(source.path, _blocks(source), chunk_bytes, from_byte):
        if before:
            yield before
        before = chunk, disk_bytes
    if before:
        yield dataclasses.replace(before[0], ends_file=True), before[1]


def _cut(path: str, blocks: Iterable[tuple[bytes, int]], chunk_bytes: int, start: int
         ) -> Iterator[tuple[Chunk, int]]:
    """Chunks of at least `chunk_bytes` that end with a line's end, the last one excepted."""
    held = bytearray()
    to_skip, searched, disk_bytes = start, 0, 0
    for block, read_bytes in blocks:
        disk_bytes += read_bytes
        skipped = min(to_skip, len(block))
        to_skip -= skipped
        held += memoryview(block)[skipped:]
        while (line_end := held.find(b"\n", max(searched, chunk_bytes - 1))) >= 0:
            data = bytes(held[:line_end + 1])
            yield Chunk(path, start, len(data), ends_file=False, data=data), disk_bytes
            del held[:line_end + 1]
            start += len(data)
            searched = disk_bytes = 0
        searched = len(held)
    if held:
        yield Chunk(path, start, len(held), ends_file=False, data=bytes(held)), disk_bytes


def _blocks(source: Input) -> Iterator[tuple[bytes, int]]:
    """Unpacked bytes, and how many bytes of the file they took."""
    if source.is_standard_input:
        for block in _read(sys.stdin.buffer, BLOCK_BYTES):
            yield block, 0
        return
    make, errors = _unpacker(source)
    with reading(source.path), open(source.path, "rb") as file:
        try:
            yield from _unpack(source, _read(file, PACKED_BLOCK_BYTES), make)
        except errors as error:
            raise UserError(f"--input {source.path}: cannot be unpacked near byte {file.tell():,} ({error}); "
                            "it is damaged or is no such archive, so fetch it again") from None


def _read(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    return iter(lambda: file.read(size_bytes), b"")


def _unpack(source: Input, packed: Iterable[bytes], make: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    """Parts that follow one another (as `cat a.gz b.gz` makes) are one text; zeros may follow the last."""
    part, is_whole = make(), False
    for block in packed:
        left, read_bytes = block, len(block)
        while left:
            if is_whole:
                left = left.lstrip(b"\0")
                if not left:
                    break
                part, is_whole = make(), False
            yield part.decompress(left), read_bytes
            is_whole, read_bytes = part.eof, 0
            left = part.unused_data
    if not is_whole:
        raise UserError(f"--input {source.path}: ends in the middle of its {source.packing} stream; it is "
                        "truncated, so fetch it again")


def _unpacker(source: Input) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    if source.packing == ".gz":
        return lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), (zlib.error,)
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(f"--input {source.path}: reading .zst needs the package zstandard; run "
                        "`pip install zstandard`") from None
    return zstandard.ZstdDecompressor().decompressobj, (zstandard.ZstdError,)
