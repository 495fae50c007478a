"""Write a torch_dist checkpoint, without torch or a process group: the counterpart of `reader`.

`.distcp` files take chunks as torch's own writer makes them; `.metadata`, written last, says where each is.
Layers are stacked, as megatron-core stacks them: a layer's tensor is a row of the whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain.export.archive import MOST_ELEMENT_BYTES, TensorArchive, values_archive
from megatron.pretrain.export.copying import Copy, Rows, copy_all
from megatron.pretrain.export.dcp_index import DCP, METADATA_FILE
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.hf import write_json
from megatron.pretrain.export.pickles import Call, Made, Named, pickled

COMMON_FILE, FORMAT_FILE = "common.pt", "metadata.json"

_FILES = 4    # so many threads can write at once
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
           "common_backend": "torch", "common_backend_version": 1}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class WeightSpec:
    """A tensor that is to be written, named `decoder.layers.0.mlp.linear_fc1.weight`, and its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: ElementType
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a tensor and their place in a file; `key` and `offsets` as the index has them."""

    key: str
    offsets: tuple[int, ...]
    archive: TensorArchive
    copy: Copy
    start_bytes: int
    length_bytes: int


def write_torch_dist(folder: Path, num_layers: int, tensors: Sequence[WeightSpec],
                     common: Mapping[str, Any]) -> Iterator[int]:
    """Write `tensors` to `folder`, and `common` beside them. Yields the bytes of each chunk written."""
    chunks = {chunk.copy: chunk for chunk in _lay_out(folder, tensors)}
    for path in {copy.path for copy in chunks}:
        path.touch()
    for copied in copy_all(list(chunks), checksums=True):
        chunk = chunks[copied.copy]
        with copied.copy.path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), chunk.archive.head(copied.crc32), chunk.start_bytes)
            os.pwrite(file.fileno(), chunk.archive.tail(copied.crc32),
                      copied.copy.offset_bytes + copied.size_bytes)
        yield copied.size_bytes
    (folder / COMMON_FILE).write_bytes(values_archive(common))
    write_json(folder / FORMAT_FILE, _FORMAT)
    (folder / METADATA_FILE).write_bytes(pickled(_index(num_layers, tensors, list(chunks.values()))))


def _lay_out(folder: Path, tensors: Iterable[WeightSpec]) -> Iterator[_Chunk]:
    """Every chunk, in the file that is the shortest so far."""
    end_bytes = {folder / f"__0_{number}.distcp": 0 for number in range(_FILES)}
    for tensor in tensors:
        key, layer = _stacked(tensor.name)
        first_row = 0
        for rows in _cut(tensor):
            shape = (sum(some.stop - some.start for some in rows), *tensor.shape[1:])
            offsets = (first_row, *(0 for _ in shape[1:]))
            first_row += shape[0]
            if layer is not None:
                shape, offsets = (1, *shape), (layer, *offsets)
            archive = TensorArchive(shape, tensor.dtype)
            path = min(end_bytes, key=end_bytes.__getitem__)
            start_bytes, head_bytes = end_bytes[path], len(archive.head())
            length_bytes = head_bytes + archive.size_bytes + len(archive.tail(0))
            end_bytes[path] += length_bytes
            copy = Copy(tensor.name, path, start_bytes + head_bytes, rows, tensor.dtype)
            yield _Chunk(key, offsets, archive, copy, start_bytes, length_bytes)


def _cut(tensor: WeightSpec) -> Iterator[tuple[Rows, ...]]:
    """The tensor's rows in portions that an archive holds."""
    row_bytes = tensor.dtype.size_bytes
    for length in tensor.shape[1:]:
        row_bytes *= length
    most_rows = max(1, MOST_ELEMENT_BYTES // row_bytes)
    portion: list[Rows] = []
    room = most_rows
    for rows in tensor.rows:
        start = rows.start
        while start < rows.stop:
            stop = min(rows.stop, start + room)
            portion.append(Rows(rows.source, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tuple(portion)
                portion, room = [], most_rows
    if portion:
        yield tuple(portion)


def _stacked(name: str) -> tuple[str, int | None]:
    """The name that a layer's tensor shares with those of the other layers, and the layer."""
    layer = _LAYER.fullmatch(name)
    return (name, None) if layer is None else (f"decoder.layers.{layer[2]}", int(layer[1]))


def _index(num_layers: int, tensors: Sequence[WeightSpec], chunks: Sequence[_Chunk]) -> Made:
    """The content of `.metadata`."""
    entries: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        key, layer = _stacked(tensor.name)
        whole = tensor.shape if layer is None else (num_layers, *tensor.shape)
        entries.setdefault(key, {"properties": _properties(tensor.dtype), "size": _size(whole), "chunks": []})
    for chunk in chunks:
        entries[chunk.key]["chunks"].append(Made(_named("ChunkStorageMetadata"), {
            "offsets": _size(chunk.offsets), "sizes": _size(chunk.archive.shape)}))
    return Made(_named("Metadata"), {
        "state_dict_metadata": {key: Made(_named("TensorStorageMetadata"), entry)
                                for key, entry in entries.items()},
        "planner_data": None, "storage_meta": None, "version": None,
        "storage_data": {_key(chunk): Made(Named(f"{DCP}.filesystem", "_StorageInfo"), {
            "relative_path": chunk.copy.path.name, "offset": chunk.start_bytes, "length": chunk.length_bytes,
        }) for chunk in chunks}})


def _key(chunk: _Chunk) -> Made:
    return Made(_named("MetadataIndex"), {
        "fqn": chunk.key, "index": None, "offset": _size(chunk.offsets)})


def _properties(dtype: ElementType) -> Made:
    """Type, layout, whether gradients are wanted, memory format (contiguous), whether pinned."""
    return Made(_named("TensorProperties"), (
        Named("torch", dtype.name), Call(Named("torch.serialization", "_get_layout"), ("torch.strided",)),
        False, Call(_named("_MEM_FORMAT_ENCODING"), (0,)), False))


def _size(lengths: tuple[int, ...]) -> Call:
    return Call(Named("torch", "Size"), (lengths,))


def _named(name: str) -> Named:
    return Named(f"{DCP}.metadata", name)
