"""A file that `torch.save` wrote, read without running anything that it names.

Plain values come as they are; a tensor comes as the place where its elements lie, to be mapped when it is
wanted; an object of Megatron's or numpy's own classes, of which a checkpoint holds many and a conversion
needs none, comes as something inert. A name of any other module is refused, and nothing but containers is
ever called.
"""

from __future__ import annotations

import argparse
import io
import mmap
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import LOCAL_HEADER, UNREADABLE, SavedTensor, TensorUnpickler

# Whose classes a checkpoint of Megatron-LM names: enumerations among its arguments, random states, signals.
_INERT_MODULES = {"_codecs", "_io", "amp_C", "apex", "collections", "datetime", "enum", "io", "megatron",
                  "numpy", "pathlib", "signal", "torch", "transformer_engine", "types"}
_CONTAINERS = {"set": set, "frozenset": frozenset, "slice": slice, "complex": complex, "bytearray": bytearray}


class SavedFile:
    """The content of one file; its tensors are `SavedTensor`s until `tensor` maps them."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is missing, truncated, of another kind, or would run code."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                root = next(name for name in (*names, "") if name.endswith("/data.pkl") or not name)
                self.content: Any = _SavedUnpickler(io.BytesIO(archive.read(root))).load()
                self._records = {name.removeprefix(root.replace("data.pkl", "data/")): archive.getinfo(name)
                                 for name in names}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except zipfile.BadZipFile:
            raise UserError(f"{path} is truncated, or was not written by torch.save of torch 1.6 or "
                            "later") from None
        except pickle.UnpicklingError as problem:
            raise UserError(f"{path} is refused: {problem}") from None
        except UNREADABLE as problem:
            raise UserError(f"{path} cannot be read, it is damaged: {problem}") from None

    def tensor(self, saved: SavedTensor) -> Tensor:
        """The tensor, mapped: it costs no memory of the process's own, and is let go with its last view."""
        try:
            elements = torch.frombuffer(self._content(saved), dtype=saved.storage.dtype)
            return elements.as_strided(saved.size, saved.stride, saved.offset)
        except UNREADABLE as problem:
            raise UserError(f"{self.path} cannot be read, it is damaged: {problem}") from None

    def check(self, saved: SavedTensor) -> None:
        """Raise UserError unless the tensor's elements have the CRC-32 they were saved with."""
        try:
            intact = zlib.crc32(self._content(saved)) == self._records[saved.storage.key].CRC
        except UNREADABLE as problem:
            raise UserError(f"{self.path} cannot be read, it is damaged: {problem}") from None
        if not intact:
            raise UserError(f"{self.path} is damaged: a tensor is not what was saved (its CRC-32 differs)")

    def _content(self, saved: SavedTensor) -> memoryview:
        """The bytes of the tensor's storage, mapped."""
        record = self._records[saved.storage.key]
        with self.path.open("rb") as file:
            file.seek(record.header_offset)
            _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            first = record.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
            start = first - first % mmap.ALLOCATIONGRANULARITY
            window = mmap.mmap(file.fileno(), first + record.file_size - start, access=mmap.ACCESS_COPY,
                               offset=start)
        window.madvise(mmap.MADV_SEQUENTIAL)
        return memoryview(window)[first - start:]


class _Inert:
    """Stands for an object of a class that is not loaded: takes what it is given, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Any state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Any item."""

    def __call__(self, *_: Any) -> _Inert:
        return self

    def extend(self, items: Any) -> None:
        """Any items."""

    append = extend


class _SavedUnpickler(TensorUnpickler):
    """Reads the values of a whole checkpoint file."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return _stand_in(module, name)


def _stand_in(module: str, name: str) -> Any:
    if (module, name) == ("argparse", "Namespace"):
        return argparse.Namespace
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module in ("builtins", "__builtin__"):
        if name == "getattr":    # how some versions of Python pickle a member of an enumeration
            return _Inert()
        if name in _CONTAINERS:
            return _CONTAINERS[name]
    elif module.partition(".")[0] in _INERT_MODULES:
        return _Inert
    raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs, and might run it")
