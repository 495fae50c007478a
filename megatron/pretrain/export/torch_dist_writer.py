"""Write a torch_dist checkpoint as a stream, without a process group: the counterpart of `reader`.

One `.distcp` file takes chunk after chunk as torch's own writer lays them out; `.metadata`, written last,
says where each is. Layers are stacked, as megatron-core stacks them: a layer's tensor is a row of the whole.
A tensor may come in pieces, its rows one after the other, each of which becomes a chunk.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata)

from megatron.pretrain.export.hf import write_json
from megatron.pretrain.export.reader import METADATA_FILE

DATA_FILE, COMMON_FILE, FORMAT_FILE = "__0_0.distcp", "common.pt", "metadata.json"

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
           "common_backend": "torch", "common_backend_version": 1}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def write_torch_dist(folder: Path, num_layers: int, tensors: Iterable[tuple[str, Sequence[Tensor]]],
                     common: Mapping[str, Any]) -> Iterator[int]:
    """Write `tensors`, named `decoder.layers.0.mlp.linear_fc1.weight`, to `folder`, and `common` beside them.

    None is held. Yields the bytes of each tensor written.
    """
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (folder / DATA_FILE).open("wb") as file:
        for name, pieces in tensors:
            key, layer = _stacked(name)
            size = torch.Size([sum(len(piece) for piece in pieces), *pieces[0].shape[1:]])
            whole = size if layer is None else torch.Size([num_layers, *size])
            entry = entries.setdefault(key, TensorStorageMetadata(_properties(pieces[0]), whole, []))
            row = 0
            for piece in pieces:
                offsets = torch.Size([row] + [0] * (piece.dim() - 1))
                row += len(piece)
                if layer is not None:
                    piece, offsets = piece.unsqueeze(0), torch.Size([layer, *offsets])
                entry.chunks.append(ChunkStorageMetadata(offsets, piece.size()))
                start_byte = file.tell()
                _save(_alone(piece), file)
                places[MetadataIndex(key, offsets)] = _StorageInfo(
                    DATA_FILE, start_byte, file.tell() - start_byte)
                yield piece.nbytes
    torch.save(dict(common), folder / COMMON_FILE)
    write_json(folder / FORMAT_FILE, _FORMAT)
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=entries, storage_data=places), file)


def _stacked(name: str) -> tuple[str, int | None]:
    """The name that a layer's tensor shares with those of the other layers, and the layer."""
    layer = _LAYER.fullmatch(name)
    return (name, None) if layer is None else (f"decoder.layers.{layer[2]}", int(layer[1]))


def _save(tensor: Tensor, file: BinaryIO) -> None:
    try:
        torch.save(tensor, file)
    except RuntimeError as problem:
        # torch ends its archive although writing failed, fails again, and hides what the system said.
        if isinstance(problem.__context__, OSError):
            raise problem.__context__ from None
        raise


def _properties(tensor: Tensor) -> TensorProperties:
    return TensorProperties(dtype=tensor.dtype, layout=torch.strided, requires_grad=False,
                            memory_format=torch.contiguous_format, pin_memory=False)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own, where it lies: torch.save writes all that a storage holds."""
    elements = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(elements).view(tensor.dtype).view(tensor.shape)
