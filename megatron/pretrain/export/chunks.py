"""Where in a file the elements of a tensor lie that `torch.save` wrote there.

What `torch.save` makes of a tensor, a chunk of a `.distcp` file for one, is a zip archive, not compressed,
with a small pickle that says type and shape, and the elements as they lie in memory. The pickle is read by a
reader that knows the few names of a plain tensor and calls nothing else.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron.pretrain.export.elements import ELEMENT_TYPES, ElementType
from megatron.pretrain.export.stored import checksum

UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
              struct.error, zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError)
"""What `find_chunk` raises for a file that is damaged or was not written by `torch.save`."""

STORAGE_NAMES = {
    "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage",
    "float64": "DoubleStorage", "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage",
    "int8": "CharStorage", "uint8": "ByteStorage", "bool": "BoolStorage"}
"""What torch calls the memory of a tensor, by the type of its elements."""

_STORAGES = {storage: ELEMENT_TYPES[name] for name, storage in STORAGE_NAMES.items()}
_LOCAL_HEADER = struct.Struct("<4s22xHH")    # signature, ..., bytes of the name, bytes of what follows it


@dataclass(frozen=True)
class _Storage:
    dtype: ElementType
    key: str


@dataclass(frozen=True)
class SavedTensor:
    """What the pickle of a plain tensor says."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def offset_bytes(self) -> int:
        """Where it begins in its storage. Raises ValueError unless its elements lie there row after row."""
        if self.offset < 0 or min(self.size, default=1) < 0:
            raise ValueError("its elements lie outside")
        expected = 1
        for length, step in zip(reversed(self.size), reversed(self.stride)):
            if length > 1 and step != expected:
                raise ValueError("its elements do not lie row after row")
            expected *= length
        return self.offset * self.storage.dtype.size_bytes


@dataclass(frozen=True)
class Record:
    """The bytes of a storage in a file, and the CRC-32 they had when they were saved."""

    path: Path
    offset_bytes: int
    size_bytes: int
    saved_crc32: int

    def is_intact(self) -> bool:
        """Whether the bytes are those that were saved; reads them all."""
        return checksum(self.path, self.offset_bytes, self.size_bytes) == self.saved_crc32


def find_chunk(path: Path, offset_bytes: int, length_bytes: int) -> tuple[SavedTensor, Record]:
    """The tensor that `torch.save` wrote to `length_bytes` of the file from `offset_bytes` on, and its bytes.

    Raises one of UNREADABLE.
    """
    with path.open("rb") as file, _Part(file, offset_bytes, length_bytes) as part:
        archive = zipfile.ZipFile(part)
        root = pickle_name(archive)
        saved = TensorUnpickler(io.BytesIO(archive.read(root))).load()
        if not isinstance(saved, SavedTensor):
            raise ValueError(f"it holds no tensor but {type(saved).__name__}")
        _check_byte_order(archive, root.replace("data.pkl", "byteorder"))
        entry = archive.getinfo(root.replace("data.pkl", f"data/{saved.storage.key}"))
        record = find_record(path, part, entry, offset_bytes)
    if saved.offset_bytes + math.prod(saved.size) * saved.storage.dtype.size_bytes > record.size_bytes:
        raise ValueError("its elements are cut off")
    return saved, record


def pickle_name(archive: zipfile.ZipFile) -> str:
    """The name of the archive's pickle, or nothing."""
    return next(name for name in (*archive.namelist(), "") if name.endswith("/data.pkl") or not name)


def find_record(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, start_bytes: int = 0) -> Record:
    """The entry's bytes in the file at `path`, in which the archive `file` begins at `start_bytes`."""
    file.seek(entry.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its elements are compressed or lost")
    first = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    return Record(path, start_bytes + first, entry.file_size, entry.CRC)


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file that zipfile can read."""

    def __init__(self, file: BinaryIO, offset_bytes: int, length_bytes: int) -> None:
        self._file, self._offset_bytes, self._length_bytes, self._at = file, offset_bytes, length_bytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length_bytes}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length_bytes - self._at)
        self._file.seek(self._offset_bytes + self._at)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(content)
        return content


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
