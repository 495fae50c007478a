"""Read a torch_dist checkpoint tensor by tensor, on a CPU, without a process group and without torch.

The folder's `.metadata` says into which chunks each tensor was cut and where in which `.distcp` file each
chunk lies. A chunk is what `torch.save` wrote of one tensor. Nothing in a checkpoint can run code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import UNREADABLE, Record, SavedTensor, find_chunk
from megatron.pretrain.export.dcp_index import METADATA_FILE, Chunk, Key, Place, TensorEntry, read_index
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.stored import Block, StoredTensor, stored_tensor

if TYPE_CHECKING:
    from torch import Tensor

# A tensor stacked over the layers, and one of a numbered layer.
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "fp8.history.")


@dataclass(frozen=True)
class _Slot:
    """What a tensor is of the index: the name it was saved under and, where it was stacked, which row."""

    key: str
    row: int | None


class TorchDistCheckpoint:
    """The weights in one iteration's folder; layers are numbered, also where they were saved stacked."""

    def __init__(self, folder: Path):
        """Read the index alone. Raises UserError if `folder` is no whole torch_dist checkpoint."""
        self.folder = folder
        index = read_index(folder)
        self._tensors: dict[str, TensorEntry] = {
            key: entry for key, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorEntry) and not key.startswith(_NOT_WEIGHTS)}
        self._storage = {(key.fqn, key.offset): place for key, place in index.storage_data.items()
                         if isinstance(key, Key) and key.fqn in self._tensors}
        self._slots = {name: slot for key, entry in self._tensors.items()
                       for name, slot in _numbered(key, entry)}
        self._find_chunk = cache(find_chunk)    # one that holds all layers is wanted once for each
        if not self._slots:
            raise UserError(f"{folder} holds no model weights")

    def names(self) -> list[str]:
        """Names of all weights, as `decoder.layers.0.mlp.linear_fc1.weight`."""
        return list(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        slot = self._slots[name]
        size = self._tensors[slot.key].size
        return size if slot.row is None else size[1:]

    def dtype(self, name: str) -> ElementType:
        """A tensor's type."""
        return self._tensors[self._slots[name].key].properties.dtype

    def check_files(self) -> None:
        """Raise UserError unless every file that the weights need is here in full length."""
        needed_bytes: dict[str, int] = {}
        for key, entry in self._tensors.items():
            for chunk in entry.chunks:
                place = self._stored(key, chunk)
                end_byte = place.offset + place.length
                needed_bytes[place.relative_path] = max(needed_bytes.get(place.relative_path, 0), end_byte)
        for relative_path, length_bytes in needed_bytes.items():
            path = self._file(relative_path)
            if not path.is_file():
                raise UserError(f"{path} is missing: {METADATA_FILE} says that weights lie in it")
            if path.stat().st_size < length_bytes:
                raise UserError(f"{path} is truncated: it has {path.stat().st_size:,} bytes, "
                                f"{METADATA_FILE} says at least {length_bytes:,}")

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor's rows lie; of a stacked one, only the layer's own. Raises UserError where the
        checkpoint is damaged."""
        slot = self._slots[name]
        blocks = [_block(chunk, slot.row, *self._find(slot.key, chunk)) for chunk in self._chunks(slot)]
        try:
            return stored_tensor(self.shape(name), self.dtype(name), blocks)
        except ValueError:
            size_bytes = self.dtype(name).size_bytes
            held = sum(block.rows * block.row_bytes for block in blocks) // size_bytes
            raise UserError(f"{self.folder}: {name} has {math.prod(self.shape(name)):,} elements, "
                            f"its saved chunks hold {held:,}: the checkpoint is damaged") from None

    def read(self, name: str) -> Tensor:
        """The whole tensor in memory."""
        return self.tensor(name).load()

    def check(self) -> None:
        """Hold every chunk against the CRC-32 it was saved with. Raises UserError where one differs."""
        for key, entry in self._tensors.items():
            for chunk in entry.chunks:
                _, record = self._find(key, chunk)
                if not record.is_intact():
                    place = self._stored(key, chunk)
                    raise UserError(f"{record.path}: {key} at byte {place.offset:,} is not what was saved "
                                    "there (its CRC-32 differs): the checkpoint is damaged")

    def _chunks(self, slot: _Slot) -> Iterator[Chunk]:
        for chunk in self._tensors[slot.key].chunks:
            if slot.row is None or chunk.offsets[0] <= slot.row < chunk.offsets[0] + chunk.sizes[0]:
                yield chunk

    def _find(self, key: str, chunk: Chunk) -> tuple[SavedTensor, Record]:
        place = self._stored(key, chunk)
        path = self._file(place.relative_path)
        try:
            saved, record = self._find_chunk(path, place.offset, place.length)
        except UNREADABLE as problem:
            reason = str(problem).partition("\n")[0]
            raise UserError(f"{path}: {key} at byte {place.offset:,} cannot be read ({reason}): "
                            "the checkpoint is damaged") from None
        if (saved.size, saved.storage.dtype) != (chunk.sizes, self._tensors[key].properties.dtype):
            raise UserError(f"{path}: what lies at byte {place.offset:,} is not the "
                            f"{list(chunk.sizes)} chunk of {key}: the checkpoint is damaged")
        return saved, record

    def _stored(self, key: str, chunk: Chunk) -> Place:
        place = self._storage.get((key, chunk.offsets))
        if place is None:
            raise UserError(f"{self.folder / METADATA_FILE} does not say where {key} lies: "
                            "the checkpoint is damaged")
        if place.transform_descriptors:
            raise UserError(f"{self.folder}: {key} was saved with {place.transform_descriptors}, "
                            "which is not read here: save it plain")
        return place

    def _file(self, relative_path: str) -> Path:
        path = self.folder / relative_path
        if path.parent != self.folder:
            raise UserError(f"{self.folder / METADATA_FILE} points outside its folder, to {relative_path}")
        return path


def _block(chunk: Chunk, layer: int | None, saved: SavedTensor, record: Record) -> Block:
    """The chunk, or what it holds of one layer."""
    offsets, sizes, skipped = chunk.offsets, chunk.sizes, 0
    if layer is not None:
        skipped = (layer - offsets[0]) * math.prod(sizes[1:])
        offsets, sizes = offsets[1:], sizes[1:]
    element_bytes = saved.storage.dtype.size_bytes
    return Block(
        record.path, record.offset_bytes + saved.offset_bytes + skipped * element_bytes, row=offsets[0],
        rows=sizes[0], row_bytes=math.prod(sizes[1:]) * element_bytes,
        column_bytes=sum(offsets[1:]) * element_bytes)


def _numbered(key: str, entry: TensorEntry) -> Iterable[tuple[str, _Slot]]:
    stacked = _STACKED.fullmatch(key)
    if stacked is None:
        yield key, _Slot(key, None)
        return
    for layer in range(entry.size[0]):
        yield f"decoder.layers.{layer}.{stacked[1]}", _Slot(key, layer)
