"""One chunk of a `.distcp` file as a tensor whose elements stay on the disk until they are used.

A chunk is what `torch.save` made of one tensor: a zip archive, not compressed, with a small pickle that says
type and shape, and the elements as they lie in memory. Mapped instead of loaded they cost no memory of the
process's own and are copied once, by whoever writes them elsewhere. The pickle is read by a reader that
knows the few names of a plain tensor and calls nothing else.
"""

from __future__ import annotations

import collections
import io
import mmap
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
              struct.error, zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError)
"""What `map_chunk` raises for a file that is damaged or was not written by `torch.save`."""

_STORAGES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
             "BoolStorage": torch.bool}
LOCAL_HEADER = struct.Struct("<4s22xHH")    # signature, ..., bytes of the name, bytes of what follows it


@dataclass(frozen=True)
class Chunk:
    """A tensor, its elements as they lie in the file, and the CRC-32 they had when they were saved."""

    tensor: Tensor
    content: memoryview
    saved_crc32: int

    def is_intact(self) -> bool:
        """Whether the elements are those that were saved; reads them all."""
        return zlib.crc32(self.content) == self.saved_crc32


def map_chunk(path: Path, offset_bytes: int, length_bytes: int) -> Chunk:
    """The tensor that `torch.save` wrote to `length_bytes` of the file from `offset_bytes` on.

    The tensor holds the mapping: it is given back when the last view of it goes. Raises one of UNREADABLE.
    """
    start = offset_bytes - offset_bytes % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        window = _Window(file.fileno(), offset_bytes + length_bytes - start, access=mmap.ACCESS_COPY,
                         offset=start)
    window.madvise(mmap.MADV_SEQUENTIAL)
    # zipfile finds the archive from its end, so what precedes it in the first page does no harm.
    archive = zipfile.ZipFile(window)
    root = next(name for name in (*archive.namelist(), "") if name.endswith("/data.pkl") or not name)
    saved = TensorUnpickler(io.BytesIO(archive.read(root))).load()
    if not isinstance(saved, SavedTensor):
        raise ValueError(f"it holds no tensor but {type(saved).__name__}")
    _check_byte_order(archive, root.replace("data.pkl", "byteorder"))
    entry = archive.getinfo(root.replace("data.pkl", f"data/{saved.storage.key}"))
    content = _content(window, entry)
    elements = torch.frombuffer(content, dtype=saved.storage.dtype)
    return Chunk(elements.as_strided(saved.size, saved.stride, saved.offset), content, entry.CRC)


class _Window(mmap.mmap):
    """A mapped part of a file that zipfile can read; Python 3.13's has the method."""

    def seekable(self) -> bool:
        return True


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class SavedTensor:
    """What the pickle of a plain tensor says."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Reads a tensor's description; every other name is refused, and none is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _saved
        if (module, name) == ("collections", "OrderedDict"):    # of its backward hooks: none
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _of_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no plain tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        return _Storage(dtype, key)


def _saved(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
           *_: Any) -> SavedTensor:
    return SavedTensor(storage, offset, tuple(size), tuple(stride))


def _of_parameter(saved: SavedTensor, *_: Any) -> SavedTensor:
    return saved


def _check_byte_order(archive: zipfile.ZipFile, name: str) -> None:
    if name in archive.namelist() and archive.read(name) != b"little":
        raise ValueError("it was saved on a big-endian machine")


def _content(window: _Window, entry: zipfile.ZipInfo) -> memoryview:
    """The entry's bytes, without a copy."""
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(window, entry.header_offset)
    if signature != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its elements are compressed or lost")
    start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    content = memoryview(window)[start:start + entry.file_size]
    if len(content) != entry.file_size:
        raise ValueError("its elements are cut off")
    return content
