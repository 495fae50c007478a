"""Token streams on disk: PREFIX.bin, PREFIX.idx and PREFIX.json.

The layout is megatron-core's `IndexedDataset`, byte for byte, little-endian throughout:

    .bin   the tokens of all documents, one after another
    .idx   "MMIDIDX" 0 0 | version u64 = 1 | dtype code u8 | sequences u64 | documents + 1 u64
           | tokens of each sequence i32 | byte offset of each sequence in .bin i64
           | first sequence of each document, and the number of sequences, i64

A document has one sequence, or none where its text was empty. The .json is ours: how the set was made.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.pretrain.data.parts import (
    FORMATS, HEADER, MAGIC, MANIFEST_FORMAT, Entries, SetWriter, WriterPosition, append_file, manifest_bytes,
    token_format)
from megatron.pretrain.data.staging import StagedFiles, writing
from megatron.pretrain.errors import UserError

DTYPE_OF_CODE = {each.code: np.dtype(each.name) for each in FORMATS.values()}
BLOCK = 1 << 20
"""Entries of an index that are in memory at once while it is written."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-LM stores ids below `vocab_size` in."""
    return np.dtype(token_format(vocab_size).name)


def dataset_prefix(path: str | os.PathLike[str]) -> str:
    """`path` without the .bin or .idx that people copy along."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedTokens:
    """One token stream and its index, memory-mapped for reading.

    tokens: every token of the set, 1-D, `dtype`.
    sequence_lengths: tokens of each sequence, int32.
    document_index: first sequence of each document and, last, the number of sequences; int64.

    Opening reads the header and the ends of the index alone. A file that is missing, truncated, of
    another format or not the other one's partner raises UserError.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = dataset_prefix(prefix)
        self.dtype, self.sequence_lengths, offsets_bytes, self.document_index = map_index(self.prefix)
        self.n_documents = len(self.document_index) - 1
        self.n_tokens = _tokens_of(self.dtype, self.sequence_lengths, offsets_bytes)
        self.tokens = _map_tokens(f"{self.prefix}.bin", self.dtype, self.n_tokens)


def count_tokens(prefix: str | os.PathLike[str]) -> int:
    """Tokens of the set at `prefix`: where its last sequence ends, read off its .idx alone."""
    return _tokens_of(*map_index(dataset_prefix(prefix))[:3])


def _tokens_of(dtype: np.dtype, sequence_lengths: np.ndarray, offsets_bytes: np.ndarray) -> int:
    if not len(offsets_bytes):
        return 0
    return int(offsets_bytes[-1]) // dtype.itemsize + int(sequence_lengths[-1])


def map_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype of the tokens, sequence lengths, sequence offsets in bytes, document index."""
    path = f"{prefix}.idx"
    with _reading(path), open(path, "rb") as file:
        header = file.read(HEADER.size)
        size_bytes = os.fstat(file.fileno()).st_size
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: is no index of a token set; tools/preprocess_data.py writes one")
    _, version, code, sequences, documents_and_end = HEADER.unpack(header)
    if version != 1 or code not in DTYPE_OF_CODE:
        raise UserError(f"{path}: version {version} with dtype code {code} cannot be read; version 1 with "
                        "integer tokens can")
    lengths_at = HEADER.size
    offsets_at = lengths_at + 4 * sequences
    documents_at = offsets_at + 8 * sequences
    right_size_bytes = documents_at + 8 * documents_and_end
    if size_bytes != right_size_bytes:
        raise UserError(f"{path}: is {size_bytes:,} bytes long where its header asks for "
                        f"{right_size_bytes:,}; it is truncated or damaged, so write it again")
    lengths = _map(path, "<i4", lengths_at, sequences)
    offsets_bytes = _map(path, "<i8", offsets_at, sequences)
    document_index = _map(path, "<i8", documents_at, documents_and_end)
    if not documents_and_end or document_index[0] != 0 or document_index[-1] != sequences:
        raise UserError(f"{path}: its documents do not cover its {sequences:,} sequences; write it again")
    return DTYPE_OF_CODE[code], lengths, offsets_bytes, document_index


def _map_tokens(path: str, dtype: np.dtype, n_tokens: int) -> np.ndarray:
    with _reading(path):
        size_bytes = os.stat(path).st_size
    if size_bytes != n_tokens * dtype.itemsize:
        raise UserError(f"{path}: is {size_bytes:,} bytes long where its .idx asks for "
                        f"{n_tokens * dtype.itemsize:,}; the two do not belong together or one is damaged")
    return _map(path, dtype, 0, n_tokens)


def _map(path: str, dtype: str | np.dtype, offset_bytes: int, count: int) -> np.ndarray:
    if not count:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset_bytes, shape=(count,))


class IndexedWriter(SetWriter):
    """Writes one token set from arrays; as a context manager, whole or not at all.

        with IndexedWriter("corpus_text_document", token_dtype(64000)) as writer:
            writer.add_document(ids, [len(ids)])

    staging: the files of a larger piece of work, which then publishes them; the block is not used.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type[np.integer], *,
                 staging: StagedFiles | None = None) -> None:
        self.dtype = np.dtype(dtype)
        super().__init__(prefix, FORMATS[self.dtype.name], staging=staging)

    def add_document(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        """Append one document of `ids`, cut into sequences of `lengths` tokens."""
        self._append(ids, np.asarray(lengths, "<i4"), np.array([len(lengths)], "<i8"))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append many documents at once: of `ids`, the first lengths[0] tokens are the first, and so on.

        A length of 0 is a document with no sequence, which is what Megatron-LM writes for an empty text.
        """
        lengths = np.asarray(lengths, "<i4")
        self._append(ids, lengths[lengths > 0], np.cumsum(lengths > 0, dtype="<i8"))

    def add_set(self, source: IndexedTokens) -> None:
        """Append another set of the same dtype, whole; its tokens are copied by the kernel where it can."""
        if source.dtype != self.dtype:
            raise ValueError(f"{source.prefix} holds {source.dtype}, not {self.dtype}")
        with _reading(f"{source.prefix}.bin"):
            tokens = open(f"{source.prefix}.bin", "rb")
        with tokens, writing(f"{self.prefix}.bin"):
            append_file(tokens, self._bin)
        lengths, offsets, documents = self._sections
        first_token = self.position.tokens
        for block in blocks(source.sequence_lengths):
            self._write(lengths, np.ascontiguousarray(block))
            self._write(offsets, _starts(block, first_token) * self.dtype.itemsize)
            first_token += int(block.sum(dtype=np.int64))
        for block in blocks(source.document_index[1:]):
            self._write(documents, block + np.int64(self.position.sequences))
        self.position = self.position.after(source.n_tokens, len(source.sequence_lengths), source.n_documents)

    def _append(self, ids: np.ndarray, lengths: np.ndarray, sequence_ends: np.ndarray) -> None:
        """`sequence_ends`: for each document, the sequences up to its end."""
        if len(ids) != lengths.sum(dtype=np.int64):
            raise ValueError(f"{len(ids)} ids do not fill sequences of {lengths.sum(dtype=np.int64)} tokens")
        entries = entries_of(_as_dtype(ids, self.dtype), lengths, sequence_ends, self.position)
        for file, values in zip((self._bin, *self._sections), entries):
            self._write(file, values)
        self.position = self.position.after(len(ids), len(lengths), len(sequence_ends))

    def _write(self, file: BinaryIO, values: np.ndarray | memoryview) -> None:
        with writing(f"{self.prefix}.bin"):
            file.write(memoryview(values))


def entries_of(ids: np.ndarray, lengths: np.ndarray, sequence_ends: np.ndarray, at: WriterPosition
               ) -> Entries:
    """Sequences of `ids`, `lengths` tokens each, as they lie in a set that is written up to `at`."""
    return Entries(ids.data, lengths.data, (_starts(lengths, at.tokens) * ids.itemsize).data,
                   (sequence_ends + np.int64(at.sequences)).data)


def _starts(lengths: np.ndarray, first: int) -> np.ndarray:
    """Where sequences of these lengths begin, one after another from `first` on."""
    return np.cumsum(lengths, dtype="<i8") - lengths + np.int64(first)


def blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """`values` in parts that fit into memory."""
    for begin in range(0, len(values), BLOCK):
        yield np.asarray(values[begin:begin + BLOCK])


def _as_dtype(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`ids` as contiguous `dtype`; an id that does not fit is an error, where a cast would wrap around."""
    ids = np.asarray(ids)
    limits = np.iinfo(dtype)
    if ids.dtype != dtype and ids.size and not (limits.min <= ids.min() and ids.max() <= limits.max):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {dtype}")
    return np.ascontiguousarray(ids, dtype)


def write_manifest(prefix: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Write PREFIX.json, whole or not at all."""
    staging = StagedFiles()
    try:
        staging.write(f"{os.fspath(prefix)}.json", [manifest_bytes(manifest)])
        staging.publish()
    except BaseException:
        staging.discard()
        raise


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What PREFIX.json says of how the set was made; None where it has none, as Megatron-LM's sets do."""
    path = Path(f"{dataset_prefix(prefix)}.json")
    if not path.exists():
        return None
    try:
        with _reading(str(path)):
            manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{path}: stands where the set's manifest would, but is none of format "
                        f"{MANIFEST_FORMAT}; move it away or preprocess again")
    return manifest


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a token set is PREFIX.bin and PREFIX.idx") from None
