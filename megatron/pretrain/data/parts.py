"""Writing a token set: as hidden parts that several processes may fill at once, each where it is told to.

    .bin         the tokens
    .lengths     tokens of each sequence, i32: the first section of the index
    .offsets     byte offset of each sequence in .bin, i64: the second
    .documents   sequences up to the end of each document, i64: the third, but for the 0 it begins with

No numpy here: importing it takes longer than a small set.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from megatron.pretrain.data.staging import StagedFiles, part_name, writing

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
MANIFEST_FORMAT = 1
SECTIONS = (".lengths", ".offsets", ".documents")
LIBC = ctypes.CDLL(None)
SYNC_FILE_RANGE_WRITE = 2  # of <fcntl.h>


@dataclass(frozen=True)
class TokenFormat:
    """What a token is on the disk. code: of the format, in the index."""

    name: str
    size_bytes: int
    code: int


FORMATS = {each.name: each for each in (
    TokenFormat("uint8", 1, 1), TokenFormat("int8", 1, 2), TokenFormat("int16", 2, 3),
    TokenFormat("int32", 4, 4), TokenFormat("int64", 8, 5), TokenFormat("uint16", 2, 8))}


def token_format(vocab_size: int) -> TokenFormat:
    """The format Megatron-LM stores ids below `vocab_size` in."""
    return FORMATS["uint16" if vocab_size < 65500 else "int32"]


class WriterPosition(NamedTuple):
    """How far a set is written."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0

    def after(self, tokens: int, sequences: int, documents: int) -> WriterPosition:
        return WriterPosition(self.tokens + tokens, self.sequences + sequences, self.documents + documents)


class Entries(NamedTuple):
    """Documents as they lie in the parts. Offsets and documents count from the beginning of the set."""

    tokens: bytes | memoryview
    lengths: bytes | memoryview
    offsets: bytes | memoryview
    documents: bytes | memoryview


def part_sizes(at: WriterPosition, format: TokenFormat) -> tuple[int, int, int, int]:
    """Bytes of each part, in the order of `Entries`, when the set is written up to `at`."""
    return at.tokens * format.size_bytes, 4 * at.sequences, 8 * at.sequences, 8 * at.documents


class PlacedWriter:
    """Writes entries of a set whose parts another process made, each at its place."""

    def __init__(self, prefix: str, format: TokenFormat) -> None:
        self._prefix, self._format = prefix, format
        self._files: list[int] = []

    def open(self) -> None:
        """Open the parts, if they are not; from then on it writes these and no later ones of their names."""
        if not self._files:
            with writing(f"{self._prefix}.bin"):
                self._files = [os.open(part_name(f"{self._prefix}{ending}"), os.O_WRONLY)
                               for ending in (".bin", *SECTIONS)]

    def write(self, entries: Entries, at: WriterPosition) -> None:
        """Raises UserError where the disk is full."""
        with writing(f"{self._prefix}.bin"):
            for file, content, place in zip(self._files, entries, part_sizes(at, self._format)):
                left, end = memoryview(content).cast("B"), place
                while left:
                    written_bytes = os.pwrite(file, left, end)
                    left, end = left[written_bytes:], end + written_bytes
                _send_to_disk(file, place, end - place)


def _send_to_disk(file: int, place: int, size_bytes: int) -> None:
    """Let the disk begin, where the system has a call for it: the end waits until all of it is there."""
    if hasattr(LIBC, "sync_file_range"):
        LIBC.sync_file_range(file, ctypes.c_int64(place), ctypes.c_int64(size_bytes), SYNC_FILE_RANGE_WRITE)


class SetWriter:
    """Makes the parts of one token set and, when they are full, the set; as a context manager, or nothing.

    Everything goes to hidden temporary names beside the final ones, the index too as it grows, so that
    memory does not grow with the set. Leaving the block renames them, the .idx last, because a set
    without it is none; leaving it by an exception removes them. A disk that is full or a folder that
    cannot be written to raises UserError.

    Args:
        prefix: of the files.
        format: of the tokens in them.
        staging: the files of a larger piece of work, which then publishes them; the block is not used.
        resume_at: what to go on from, of the parts that an interrupted run left.

    position: how far the parts are written; whoever writes them keeps it up to date.
    """

    def __init__(self, prefix: str | os.PathLike[str], format: TokenFormat, *,
                 staging: StagedFiles | None = None, resume_at: WriterPosition = WriterPosition()) -> None:
        self.prefix = os.fspath(prefix)
        self.format = format
        self.position = resume_at
        self._sealed = False
        self._staging = staging or StagedFiles()
        bin_bytes, *sections_bytes = part_sizes(resume_at, format)
        self._bin = self._staging.create(f"{self.prefix}.bin", bin_bytes)
        self._sections = [self._staging.create_scratch(f"{self.prefix}{ending}", size_bytes)
                          for ending, size_bytes in zip(SECTIONS, sections_bytes)]

    @property
    def n_tokens(self) -> int:
        return self.position.tokens

    @property
    def n_documents(self) -> int:
        return self.position.documents

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._staging.discard()
            return
        try:
            if not self._sealed:
                self.seal()
            self._staging.publish()
        except BaseException:
            self._staging.discard()
            raise

    def seal(self, manifest: dict[str, Any] | None = None) -> None:
        """Finish the files, still under their temporary names; the .json too where `manifest` is given.

        Sealing several sets before any is renamed keeps a full disk from leaving some behind.
        """
        if manifest is not None:
            self._staging.write(f"{self.prefix}.json", [manifest_bytes(manifest)])
        index = self._staging.create(f"{self.prefix}.idx")
        with writing(f"{self.prefix}.idx"):
            self._write_index(index)
        self._sealed = True

    def _write_index(self, index: BinaryIO) -> None:
        index.write(HEADER.pack(MAGIC, 1, self.format.code, self.position.sequences,
                                self.position.documents + 1))
        lengths, offsets, documents = self._sections
        append_file(lengths, index)
        append_file(offsets, index)
        index.write(bytes(8))
        append_file(documents, index)


def append_file(source: BinaryIO, target: BinaryIO) -> None:
    """Append all of `source` to `target`: within the kernel where the file systems let it."""
    source.flush()
    target.flush()
    source.seek(0)
    left_bytes = os.fstat(source.fileno()).st_size
    try:
        while left_bytes > 0:
            copied_bytes = os.copy_file_range(source.fileno(), target.fileno(), left_bytes)
            if not copied_bytes:
                break
            left_bytes -= copied_bytes
    except (AttributeError, OSError) as error:  # macOS has no such call
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
    # What is left where these file systems do not offer it.
    source.seek(os.lseek(source.fileno(), 0, os.SEEK_CUR))
    target.seek(0, os.SEEK_END)
    shutil.copyfileobj(source, target, 1 << 22)


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    content = {"format": MANIFEST_FORMAT, **manifest}
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
