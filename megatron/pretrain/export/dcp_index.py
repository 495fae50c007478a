"""The index of a torch_dist checkpoint, `.metadata`, read without torch and without running what it names.

It is a pickle of objects of torch.distributed.checkpoint, which takes seconds to load: a name of its format
comes as a record of its fields, any other is refused, and nothing but those records and tuples is called.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import ELEMENT_TYPES, ElementType

METADATA_FILE = ".metadata"

_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError,
            ImportError, MemoryError, UnicodeDecodeError)


class _Record:
    """An object of the format: its fields as attributes."""

    def __init__(self, *_: Any) -> None:
        """Any arguments."""


class Index(_Record):
    """The whole index: `state_dict_metadata` and `storage_data`."""


class TensorEntry(_Record):
    """A tensor: its `size`, its `chunks` and, in `properties`, its type."""


class Properties(_Record):
    """What a tensor is beside its size: `dtype`."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class Chunk(_Record):
    """A part of a tensor: `offsets` and `sizes`."""


class Key(_Record):
    """Which part of which tensor: the tensor's name `fqn`, and `offset`, the part's place in it."""

    fqn: str
    offset: tuple[int, ...] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and (self.fqn, self.offset) == (other.fqn, other.offset)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


class Place(_Record):
    """Where a part lies: `relative_path`, `offset` and `length` in bytes."""

    transform_descriptors: Any = None


def _first(value: Any = (), *_: Any) -> Any:
    """What an enumeration's member or a layout is made of."""
    return value


def _size(lengths: Any = ()) -> tuple[int, ...]:
    return tuple(lengths)


DCP = "torch.distributed.checkpoint"
"""The package whose classes the index names, in `metadata` and `filesystem`."""

_KNOWN: dict[tuple[str, str], Any] = {
    (f"{DCP}.metadata", "Metadata"): Index,
    (f"{DCP}.metadata", "TensorStorageMetadata"): TensorEntry,
    (f"{DCP}.metadata", "TensorProperties"): Properties,
    (f"{DCP}.metadata", "ChunkStorageMetadata"): Chunk,
    (f"{DCP}.metadata", "MetadataIndex"): Key,
    (f"{DCP}.metadata", "BytesStorageMetadata"): _Record,
    (f"{DCP}.metadata", "StorageMeta"): _Record,
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): _first,
    (f"{DCP}.filesystem", "_StorageInfo"): Place,
    (f"{DCP}.planner", "SavePlan"): _Record,
    (f"{DCP}.planner", "TensorWriteData"): _Record,
    (f"{DCP}.planner", "WriteItem"): _Record,
    (f"{DCP}.planner", "WriteItemType"): _first,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _first,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
}


class _IndexUnpickler(pickle.Unpickler):
    """Loads `.metadata` and nothing else: a name that is not of its format is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in ELEMENT_TYPES:
            return ELEMENT_TYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")


def read_index(folder: Path) -> Index:
    """The index of the checkpoint in `folder`. Raises UserError where there is none, or a damaged one."""
    path = folder / METADATA_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: a checkpoint is one, such as .../iter_0000100")
    if not path.is_file():
        raise UserError(f"{folder} is not a whole torch_dist checkpoint: " + _what_it_is_instead(folder))
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        _check(index)
    except _DAMAGED as problem:
        raise UserError(f"{path} is refused, it is no checkpoint index or a damaged one: {problem}") from None
    return index


def _check(index: Index) -> None:
    """Raises one of _DAMAGED where a field that a reader needs is missing or of another kind."""
    for entry in index.state_dict_metadata.values():
        if isinstance(entry, TensorEntry):
            described = [entry.size, *(chunk.sizes for chunk in entry.chunks),
                         *(chunk.offsets for chunk in entry.chunks)]
            if len({len(lengths) for lengths in described}) > 1 or not isinstance(
                    entry.properties.dtype, ElementType):
                raise ValueError("its sizes and types contradict each other")
    for key, place in index.storage_data.items():
        key.fqn, place.relative_path, place.offset + place.length


def _what_it_is_instead(folder: Path) -> str:
    content = sorted(entry.name for entry in folder.iterdir())
    if not content:
        return "it is empty"
    if any(name.startswith("mp_rank_") for name in content):
        return f"it holds {content[0]}, Megatron-LM's older format"
    if any(name.startswith("iter_") for name in content):
        return f"it holds a folder for each saved iteration, name one of them, such as {folder / content[0]}"
    return f"it holds no {METADATA_FILE}"
