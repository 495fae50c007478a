"""Read the weights of a Hugging Face folder tensor by tensor, from one .safetensors file or many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import BF16, FP16, FP32, ElementType
from megatron.pretrain.export.stored import Block, StoredTensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

SAFETENSORS_TYPES = {BF16: "BF16", FP16: "F16", FP32: "F32"}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}
_MOST_HEADER_BYTES = 100_000_000    # as the safetensors library allows
# Tables that old versions of transformers saved although they follow from the configuration.
_NOT_WEIGHTS = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Entry:
    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int


class HfFolder:
    """The weights in a folder that transformers reads."""

    def __init__(self, folder: Path) -> None:
        """Read the headers alone. Raises UserError where a file is missing, damaged or of another format."""
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        index = _read_index(folder)
        for path in sorted(set(index.values())) if index else [folder / SINGLE_FILE]:
            self._entries |= _read_header(path)
        for name, path in index.items():
            if name not in self._entries or self._entries[name].path != path:
                raise UserError(f"{path} has no {name}, but {INDEX_FILE} says so: the files are not of one "
                                "model")

    def names(self) -> list[str]:
        """Names of all weights, as `model.layers.0.mlp.up_proj.weight`."""
        return list(self._entries)

    def path(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._entries[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> ElementType:
        """A tensor's type. Raises UserError for one of a quantized model."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.path}: {name} is of type {entry.dtype}; only {', '.join(_DTYPES)} are "
                            "weights to train from")
        return _DTYPES[entry.dtype]

    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(entry.shape) * self.dtype(name).size_bytes
                   for name, entry in self._entries.items())

    def tensor(self, name: str) -> StoredTensor:
        """Where the tensor's rows lie. Raises UserError as `dtype` does."""
        entry, dtype = self._entries[name], self.dtype(name)
        row_bytes = math.prod(entry.shape[1:]) * dtype.size_bytes
        return StoredTensor(entry.shape, dtype, (
            Block(entry.path, entry.offset_bytes, row=0, rows=entry.shape[0], row_bytes=row_bytes),))


def _read_index(folder: Path) -> dict[str, Path]:
    """The file of each tensor; empty where all are in one file."""
    if (folder / SINGLE_FILE).is_file():
        return {}
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{folder} " + _what_it_is_instead(folder))
    try:
        places = orjson.loads(path.read_bytes())["weight_map"]
        return {name: folder / Path(file).name for name, file in places.items()}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is damaged: it should say where each tensor lies ({problem})") from None


def _what_it_is_instead(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder: give one that transformers reads, with config.json and .safetensors"
    if any(folder.glob("*.bin")):
        return ("holds .bin files, which are pickles and may run code: save the model as .safetensors first "
                "(transformers: save_pretrained)")
    return f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _read_header(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {INDEX_FILE} says that weights lie in it")
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(_MOST_HEADER_BYTES, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            content = orjson.loads(file.read(header_bytes))
        return dict(_entries(path, 8 + header_bytes, content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is truncated or no .safetensors file ({problem})") from None


def _entries(path: Path, start_bytes: int, content: dict[str, Any]) -> Iterator[tuple[str, _Entry]]:
    """The tensors of a header, whose elements begin at `start_bytes`. Raises ValueError where the file is not
    as long as it says."""
    last_byte = start_bytes
    for name, said in content.items():
        if name == "__metadata__":
            continue
        first, end = said["data_offsets"]
        shape, dtype = tuple(said["shape"]), said["dtype"]
        if not 0 <= first <= end or not all(isinstance(length, int) for length in shape):
            raise ValueError(f"{name} lies nowhere")
        if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].size_bytes != end - first:
            raise ValueError(f"the size of {name} is not that of its shape")
        last_byte = max(last_byte, start_bytes + end)
        if not name.endswith(_NOT_WEIGHTS):
            yield name, _Entry(path, shape, dtype, start_bytes + first)
    if path.stat().st_size != last_byte:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, its header says {last_byte:,}")
