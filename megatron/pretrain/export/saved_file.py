"""A file that `torch.save` wrote, read without running anything that it names.

Plain values come as they are; a tensor comes as what says where its elements lie; an object of Megatron's or
numpy's own classes, of which a checkpoint holds many and a conversion needs none, comes as something inert. A
name of any other module is refused, and nothing but containers is ever called.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import (
    UNREADABLE, SavedTensor, TensorUnpickler, find_record, pickle_name)
from megatron.pretrain.export.elements import ELEMENT_TYPES
from megatron.pretrain.export.stored import Block
from megatron.pretrain.export.weights import Held

# Whose classes a checkpoint of Megatron-LM names: enumerations among its arguments, random states, signals.
_INERT_MODULES = {"_codecs", "_io", "amp_C", "apex", "collections", "datetime", "enum", "io", "megatron",
                  "numpy", "pathlib", "signal", "torch", "transformer_engine", "types"}
_CONTAINERS = {"set": set, "frozenset": frozenset, "slice": slice, "complex": complex, "bytearray": bytearray}


class SavedFile:
    """The content of one file; its tensors are `SavedTensor`s, whose elements stay in the file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is missing, truncated, of another kind, or would run code."""
        self.path = path
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                root = pickle_name(archive)
                self.content: Any = _SavedUnpickler(io.BytesIO(archive.read(root))).load()
                storages = root.replace("data.pkl", "data/")
                self._records = {entry.filename.removeprefix(storages): find_record(path, file, entry)
                                 for entry in archive.infolist() if entry.filename.startswith(storages)}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except zipfile.BadZipFile:
            raise UserError(f"{path} is truncated, or was not written by torch.save of torch 1.6 or "
                            "later") from None
        except pickle.UnpicklingError as problem:
            raise UserError(f"{path} is refused: {problem}") from None
        except UNREADABLE as problem:
            raise UserError(f"{path} cannot be read, it is damaged: {problem}") from None

    def block(self, saved: SavedTensor, held: Held) -> Block:
        """Where the rows of the tensor that `held` means lie, and their place in the whole."""
        try:
            row_bytes = math.prod(saved.size[1:]) * saved.storage.dtype.size_bytes
            first = saved.offset_bytes + held.start * row_bytes
            record = self._records[saved.storage.key]
            if first + held.rows * row_bytes > record.size_bytes:
                raise ValueError("its elements are cut off")
        except UNREADABLE as problem:
            raise UserError(f"{self.path} cannot be read, it is damaged: {problem}") from None
        return Block(self.path, record.offset_bytes + first, held.row, held.rows, row_bytes,
                     held.column * saved.storage.dtype.size_bytes)

    def check(self, saved: SavedTensor) -> None:
        """Raise UserError unless the tensor's elements have the CRC-32 they were saved with."""
        if not self._records[saved.storage.key].is_intact():
            raise UserError(f"{self.path} is damaged: a tensor is not what was saved (its CRC-32 differs)")


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
    if module == "torch" and name in ELEMENT_TYPES:
        return ELEMENT_TYPES[name]
    if module in ("builtins", "__builtin__"):
        if name == "getattr":    # how some versions of Python pickle a member of an enumeration
            return _Inert()
        if name in _CONTAINERS:
            return _CONTAINERS[name]
    elif module.partition(".")[0] in _INERT_MODULES:
        return _Inert
    raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs, and might run it")
