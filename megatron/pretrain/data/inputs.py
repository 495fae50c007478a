"""What --input names: files, globs, folders, compressed files and standard input, one after another."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain.data.documents import open_source, reading
from megatron.pretrain.errors import UserError

STANDARD_INPUT = "-"
LINES_ENDINGS = (".jsonl", ".json", ".ndjson")
PACKED_ENDINGS = (".gz", ".zst")
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Input:
    """A file of JSON lines as it is on the disk, or standard input (0 bytes, nothing known).

    sample_sha256: sha256 (hex) over the size and 64 blocks of 64 KiB, evenly spread from the file's
        first byte to its last. It costs the same for any size; that the size and the blocks are the
        same makes two files the same for every purpose but proof.
    """

    path: str
    size_bytes: int
    modified_ns: int
    sample_sha256: str | None

    @property
    def packing(self) -> str:
        """The ending that says how the file is compressed, or ''."""
        ending = os.path.splitext(self.path)[1].lower()
        return ending if ending in PACKED_ENDINGS else ""

    @property
    def is_standard_input(self) -> bool:
        return self.path == STANDARD_INPUT

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read from its beginning on."""
        return self.is_standard_input or bool(self.packing)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        facts = asdict(self)
        del facts["modified_ns"]
        return facts


def open_inputs(words: Sequence[str]) -> list[Input]:
    """The inputs in the order of the words; within a glob or a folder in the order of their names.

    Raises UserError for what is not there, cannot be read, or names nothing.
    """
    paths = [path for word in words for path in _paths_of(word)]
    if paths.count(STANDARD_INPUT) > 1:
        raise UserError("--input -: standard input can be read only once")
    return [_open_input(path) for path in paths]


def _paths_of(word: str) -> list[str]:
    if word == STANDARD_INPUT:
        return [word]
    if os.path.isdir(word):
        return _files_of_folder(word)
    if glob.has_magic(word) and not os.path.exists(word):
        paths = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not paths:
            raise UserError(f"--input {word}: matches no file")
        return paths
    return [word]


def _files_of_folder(folder: str) -> list[str]:
    """All JSON lines under it; our own manifests and rejects may lie there too and are none."""
    endings = tuple(f"{lines}{packed}" for lines in LINES_ENDINGS for packed in ("", *PACKED_ENDINGS))
    found = sorted(
        str(path) for path in Path(folder).rglob("*")
        if path.name.lower().endswith(endings) and path.is_file() and not path.name.startswith(".")
        and not path.name.endswith("_rejects.jsonl") and not path.with_suffix(".idx").exists())
    if not found:
        raise UserError(f"--input {folder}: is a folder without {', '.join(LINES_ENDINGS)} files "
                        f"(plain or {' or '.join(PACKED_ENDINGS)})")
    return found


def _open_input(path: str) -> Input:
    if path == STANDARD_INPUT:
        return Input(path, 0, 0, None)
    size_bytes = open_source(path).size_bytes
    return Input(path, size_bytes, os.stat(path).st_mtime_ns, _sample_sha256(path, size_bytes))


def _sample_sha256(path: str, size_bytes: int) -> str:
    digest = hashlib.sha256(str(size_bytes).encode())
    last = max(0, size_bytes - SAMPLE_BYTES)
    with reading(path), open(path, "rb", buffering=0) as file:
        for place in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            file.seek(place)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
