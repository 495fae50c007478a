"""Safetensors written as a stream, with their index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import torch
from torch import Tensor

_SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_json(path: Path, content: Any) -> None:
    """Write `content` as people read JSON."""
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements' bytes in the order of the indices; a copy only where they do not lie so."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_safetensors(folder: Path, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]],
                      max_shard_bytes: int) -> Iterator[int]:
    """Write `tensors`, which come in the order of `specs`, to shards in `folder`, with their index.

    A shard's header states every offset, and `specs` knows them all beforehand: so each tensor goes to
    the disk as it comes, and none is held here. Yields the bytes of each tensor written.
    """
    shards = _fill_shards(specs, max_shard_bytes)
    file_names = _shard_names(len(shards))
    stream = iter(tensors)
    for file_name, shard in zip(file_names, shards):
        with (folder / file_name).open("wb") as file:
            file.write(_header(shard))
            for spec in shard:
                yield _write_tensor(file, spec, *next(stream))
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(spec.size_bytes for spec in specs)},
            "weight_map": {spec.name: file_name
                           for file_name, shard in zip(file_names, shards) for spec in shard}})


def _fill_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if shards[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += spec.size_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(shard: Sequence[TensorSpec]) -> bytes:
    """Length and JSON, padded so that the first tensor is aligned (github.com/huggingface/safetensors)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for spec in shard:
        end_bytes = offset_bytes + spec.size_bytes
        entries[spec.name] = {"dtype": _SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape,
                              "data_offsets": [offset_bytes, end_bytes]}
        offset_bytes = end_bytes
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, spec: TensorSpec, name: str, tensor: Tensor) -> int:
    if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
        raise RuntimeError(f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {spec} was announced")
    return file.write(bytes_of(tensor))
