"""The file that `torch.save` makes of a tensor, all but the elements: what comes before and after them.

A zip archive that is not compressed; its pickle says type and shape. The elements begin at a multiple of 64
bytes, as in torch's own archives. Written here because loading torch takes longer than copying gigabytes.
"""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron.pretrain.export.chunks import STORAGE_NAMES
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.pickles import Call, Named, Persistent, pickled

MOST_ELEMENT_BYTES = 2**30
"""More than 4 GiB an archive of this kind cannot hold; less spreads a large tensor over several threads."""

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_EXTRA = struct.Struct("<2sH")
_ALIGNMENT_BYTES = 64
_NO_DATE = (0, 0x21)    # 1 January 1980, the first day that a zip archive can name
_VERSION = ("version", b"3\n")


@dataclass(frozen=True)
class _Record:
    """A file of the archive; `extra` are bytes of no meaning that move what follows."""

    name: str
    size_bytes: int
    crc32: int
    extra: bytes = b""

    def local_header(self) -> bytes:
        name = f"archive/{self.name}".encode()
        return _LOCAL.pack(b"PK\3\4", 0, 0x800, 0, *_NO_DATE, self.crc32, self.size_bytes, self.size_bytes,
                           len(name), len(self.extra)) + name + self.extra

    def central_header(self, offset_bytes: int) -> bytes:
        name = f"archive/{self.name}".encode()
        return _CENTRAL.pack(b"PK\1\2", 0, 0, 0x800, 0, *_NO_DATE, self.crc32, self.size_bytes,
                             self.size_bytes, len(name), 0, 0, 0, 0, 0, offset_bytes) + name


@dataclass(frozen=True)
class TensorArchive:
    """The archive of one tensor, of at most MOST_ELEMENT_BYTES."""

    shape: tuple[int, ...]
    dtype: ElementType

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.size_bytes

    def head(self, crc32: int = 0) -> bytes:
        """What comes before the elements, whose checksum is `crc32`; its length does not depend on it."""
        before = b"".join(_whole(name, content) for name, content in self._before().items())
        unaligned = len(before) + len(self._elements(crc32).local_header()) + _EXTRA.size
        padding = -unaligned % _ALIGNMENT_BYTES
        return before + self._elements(crc32, _EXTRA.pack(b"FB", padding) + bytes(padding)).local_header()

    def tail(self, crc32: int) -> bytes:
        """What comes after them."""
        records = [_small(name, content) for name, content in self._before().items()]
        starts_bytes = accumulate((len(_whole(name, content)) for name, content in self._before().items()),
                                  initial=0)
        end_bytes = len(self.head()) + self.size_bytes
        return _whole(*_VERSION) + _contents(
            zip([*records, self._elements(crc32), _small(*_VERSION)], [*starts_bytes, end_bytes]),
            end_bytes + len(_whole(*_VERSION)))

    def _before(self) -> dict[str, bytes]:
        """The files that come before the elements.

        The pickle calls `_rebuild_tensor_v2` with a storage, an offset, a size, a stride, and no hooks.
        """
        strides = tuple(math.prod(self.shape[axis + 1:]) for axis in range(len(self.shape)))
        storage = Persistent(("storage", Named("torch", STORAGE_NAMES[self.dtype.name]), "0", "cpu",
                              math.prod(self.shape)))
        return {"data.pkl": pickled(Call(Named("torch._utils", "_rebuild_tensor_v2"), (
            storage, 0, self.shape, strides, False, Call(Named("collections", "OrderedDict"), ())))),
            "byteorder": b"little"}

    def _elements(self, crc32: int, extra: bytes = b"") -> _Record:
        return _Record("data/0", self.size_bytes, crc32, extra)


def values_archive(values: Mapping[str, Any]) -> bytes:
    """What `torch.save` makes of a dictionary without tensors."""
    files = [("data.pkl", pickle.dumps(dict(values), protocol=2)), ("byteorder", b"little"), _VERSION]
    starts_bytes = list(accumulate((len(_whole(*file)) for file in files), initial=0))
    return b"".join(_whole(*file) for file in files) + _contents(
        zip((_small(*file) for file in files), starts_bytes), starts_bytes[-1])


def _contents(records: Iterable[tuple[_Record, int]], offset_bytes: int) -> bytes:
    """The table at the archive's end, which begins at `offset_bytes`: records, and where each begins."""
    headers = [record.central_header(start_bytes) for record, start_bytes in records]
    size_bytes = sum(map(len, headers))
    return b"".join(headers) + _END.pack(b"PK\5\6", 0, 0, len(headers), len(headers), size_bytes,
                                         offset_bytes, 0)


def _small(name: str, content: bytes) -> _Record:
    return _Record(name, len(content), zlib.crc32(content))


def _whole(name: str, content: bytes) -> bytes:
    return _small(name, content).local_header() + content
