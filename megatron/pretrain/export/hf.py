"""Where every tensor goes in a folder of .safetensors, and all of those files but the tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import orjson

from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.hf_reader import INDEX_FILE, SAFETENSORS_TYPES, SINGLE_FILE


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: ElementType

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.size_bytes


def write_json(path: Path, content: Any) -> None:
    """Write `content` as people read JSON."""
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements are to lie."""

    spec: TensorSpec
    path: Path
    offset_bytes: int


def begin_safetensors(folder: Path, specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[Place]:
    """Write the shards' headers and their index to `folder`, and say where in which shard each tensor goes.

    A header states every offset, and `specs` knows them all beforehand: so tensors may be written in any
    order. They come first shard by shard's first, then each shard's second, and so on, that those who write
    several at once write to several files.
    """
    shards = _fill_shards(specs, max_shard_bytes)
    file_names = _shard_names(len(shards))
    places = []
    for file_name, shard in zip(file_names, shards):
        header = _header(shard)
        (folder / file_name).write_bytes(header)
        offsets_bytes = accumulate((spec.size_bytes for spec in shard), initial=len(header))
        places.append([Place(spec, folder / file_name, at) for spec, at in zip(shard, offsets_bytes)])
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {
            "metadata": {"total_size": sum(spec.size_bytes for spec in specs)},
            "weight_map": {spec.name: file_name
                           for file_name, shard in zip(file_names, shards) for spec in shard}})
    return [place for across in zip_longest(*places) for place in across if place is not None]


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
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(shard: Sequence[TensorSpec]) -> bytes:
    """Length and JSON, padded so that the first tensor is aligned (github.com/huggingface/safetensors)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for spec in shard:
        end_bytes = offset_bytes + spec.size_bytes
        entries[spec.name] = {"dtype": SAFETENSORS_TYPES[spec.dtype], "shape": spec.shape,
                              "data_offsets": [offset_bytes, end_bytes]}
        offset_bytes = end_bytes
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
