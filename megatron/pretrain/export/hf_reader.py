"""Read the weights of a Hugging Face folder tensor by tensor, from one .safetensors file or many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.pretrain.errors import UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tables that old versions of transformers saved although they follow from the configuration.
_NOT_WEIGHTS = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Entry:
    path: Path
    shape: tuple[int, ...]
    dtype: str


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

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type. Raises UserError for one of a quantized model."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.path}: {name} is of type {entry.dtype}; only {', '.join(_DTYPES)} are "
                            "weights to train from")
        return _DTYPES[entry.dtype]

    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(entry.shape) * self.dtype(name).itemsize
                   for name, entry in self._entries.items())

    def read(self, name: str) -> Tensor:
        """The tensor, mapped; the file is let go with the tensor, so no other stays in memory."""
        path = self._entries[name].path
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{path}: {name} cannot be read ({problem}): the file is damaged") from None


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
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if not name.endswith(_NOT_WEIGHTS)}
            return {name: _Entry(path, tuple(one.get_shape()), one.get_dtype())
                    for name, one in slices.items()}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is truncated or no .safetensors file ({problem})") from None
