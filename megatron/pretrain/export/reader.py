"""Read a torch_dist checkpoint tensor by tensor, on a CPU, without a process group.

The folder's `.metadata` is a pickle that says into which chunks each tensor was cut and where in which
`.distcp` file each chunk lies. A chunk is what `torch.save` wrote of one tensor. Nothing in a checkpoint
can run code: the pickle may name only the classes below, a chunk's only those of a plain tensor.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import UNREADABLE, map_chunk

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.planner", "SavePlan"),
    (f"{_DCP}.planner", "TensorWriteData"),
    (f"{_DCP}.planner", "WriteItem"),
    (f"{_DCP}.planner", "WriteItemType"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}

# A tensor stacked over the layers, and one of a numbered layer.
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "fp8.history.")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the name it was saved under and, where it was stacked, which row is it."""

    key: str
    row: int | None


class TorchDistCheckpoint:
    """The weights in one iteration's folder; layers are numbered, also where they were saved stacked."""

    def __init__(self, folder: Path):
        """Read the index alone. Raises UserError if `folder` is no whole torch_dist checkpoint."""
        self.folder = folder
        metadata = _read_metadata(folder)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS)}
        self._storage: dict[MetadataIndex, Any] = {
            index: info for index, info in metadata.storage_data.items() if index.fqn in self._tensors}
        self._places = {name: place for key, entry in self._tensors.items()
                        for name, place in _numbered(key, entry)}
        if not self._places:
            raise UserError(f"{folder} holds no model weights")

    def names(self) -> list[str]:
        """Names of all weights, as `decoder.layers.0.mlp.linear_fc1.weight`."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        place = self._places[name]
        size = tuple(self._tensors[place.key].size)
        return size if place.row is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type."""
        return self._tensors[self._places[name].key].properties.dtype

    def check_files(self) -> None:
        """Raise UserError unless every file that the weights need is here in full length."""
        needed_bytes: dict[str, int] = {}
        for key, entry in self._tensors.items():
            for chunk in entry.chunks:
                info = self._stored(key, chunk)
                end_byte = info.offset + info.length
                needed_bytes[info.relative_path] = max(needed_bytes.get(info.relative_path, 0), end_byte)
        for relative_path, length_bytes in needed_bytes.items():
            path = self._file(relative_path)
            if not path.is_file():
                raise UserError(f"{path} is missing: {METADATA_FILE} says that weights lie in it")
            if path.stat().st_size < length_bytes:
                raise UserError(f"{path} is truncated: it has {path.stat().st_size:,} bytes, "
                                f"{METADATA_FILE} says at least {length_bytes:,}")

    def read(self, name: str, *, checked: bool = False) -> Tensor:
        """The whole tensor on the CPU; of a stacked one, only the layer's own chunks.

        A tensor that lies in one piece is mapped, not loaded: its elements are read when they are used and
        are no memory of the process's own. Otherwise it is put together. `checked` holds each chunk against
        the CRC-32 it was saved with. Raises UserError where the checkpoint is damaged.
        """
        place = self._places[name]
        entry = self._tensors[place.key]
        chunks = [chunk for chunk in entry.chunks if _holds(chunk, place.row)]
        result: Tensor | None = None
        filled = 0
        for chunk in chunks:
            part, offsets = self._load(place.key, chunk, checked), tuple(chunk.offsets)
            if place.row is not None:
                part, offsets = part[place.row - offsets[0]], offsets[1:]
            if part.shape == self.shape(name):
                return part
            if result is None:
                result = torch.empty(self.shape(name), dtype=self.dtype(name))
            result[tuple(slice(at, at + length) for at, length in zip(offsets, part.shape))] = part
            filled += part.numel()
        if result is None or filled != result.numel():
            raise UserError(f"{self.folder}: {name} has {math.prod(self.shape(name)):,} elements, "
                            f"its saved chunks hold {filled:,}: the checkpoint is damaged")
        return result

    def _load(self, key: str, chunk: ChunkStorageMetadata, checked: bool) -> Tensor:
        info = self._stored(key, chunk)
        path = self._file(info.relative_path)
        try:
            mapped = map_chunk(path, info.offset, info.length)
        except UNREADABLE as problem:
            reason = str(problem).partition("\n")[0]
            raise UserError(f"{path}: {key} at byte {info.offset:,} cannot be read ({reason}): "
                            "the checkpoint is damaged") from None
        if mapped.tensor.shape != chunk.sizes or mapped.tensor.dtype != self._tensors[key].properties.dtype:
            raise UserError(f"{path}: what lies at byte {info.offset:,} is not the "
                            f"{list(chunk.sizes)} chunk of {key}: the checkpoint is damaged")
        if checked and not mapped.is_intact():
            raise UserError(f"{path}: {key} at byte {info.offset:,} is not what was saved there (its CRC-32 "
                            "differs): the checkpoint is damaged")
        return mapped.tensor

    def _stored(self, key: str, chunk: ChunkStorageMetadata) -> Any:
        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise UserError(f"{self.folder / METADATA_FILE} does not say where {key} lies: "
                            "the checkpoint is damaged")
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.folder}: {key} was saved with {info.transform_descriptors}, "
                            "which is not read here: save it plain")
        return info

    def _file(self, relative_path: str) -> Path:
        path = self.folder / relative_path
        if path.parent != self.folder:
            raise UserError(f"{self.folder / METADATA_FILE} points outside its folder, to {relative_path}")
        return path


class _MetadataUnpickler(pickle.Unpickler):
    """Loads `.metadata` and nothing else: a class that is not of its format is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")


def _read_metadata(folder: Path) -> Any:
    path = folder / METADATA_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: a checkpoint is one, such as .../iter_0000100")
    if not path.is_file():
        raise UserError(f"{folder} is not a whole torch_dist checkpoint: " + _what_it_is_instead(folder))
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.state_dict_metadata.items(), metadata.storage_data.items()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError,
            ImportError, MemoryError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is refused, it is no checkpoint index or a damaged one: {problem}") from None
    return metadata


def _what_it_is_instead(folder: Path) -> str:
    content = sorted(entry.name for entry in folder.iterdir())
    if not content:
        return "it is empty"
    if any(name.startswith("mp_rank_") for name in content):
        return f"it holds {content[0]}, Megatron-LM's older format"
    if any(name.startswith("iter_") for name in content):
        return f"it holds a folder for each saved iteration, name one of them, such as {folder / content[0]}"
    return f"it holds no {METADATA_FILE}"


def _numbered(key: str, entry: TensorStorageMetadata) -> Iterable[tuple[str, _Place]]:
    stacked = _STACKED.fullmatch(key)
    if stacked is None:
        yield key, _Place(key, None)
        return
    for layer in range(entry.size[0]):
        yield f"decoder.layers.{layer}.{stacked[1]}", _Place(key, layer)


def _holds(chunk: ChunkStorageMetadata, row: int | None) -> bool:
    return row is None or chunk.offsets[0] <= row < chunk.offsets[0] + chunk.sizes[0]
