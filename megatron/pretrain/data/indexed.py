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
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.pretrain.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
MANIFEST_FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-LM stores ids below `vocab_size` in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


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
        self.dtype, self.sequence_lengths, offsets_bytes, self.document_index = _map_index(self.prefix)
        self.n_documents = len(self.document_index) - 1
        self.n_tokens = 0
        if len(offsets_bytes):
            self.n_tokens = int(offsets_bytes[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1])
        self.tokens = _map_tokens(f"{self.prefix}.bin", self.dtype, self.n_tokens)


def count_tokens(prefix: str | os.PathLike[str]) -> int:
    """Tokens of the set at `prefix`, read off its .idx alone."""
    _, sequence_lengths, _, _ = _map_index(dataset_prefix(prefix))
    return int(sequence_lengths.sum(dtype=np.int64))


def _map_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
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
    return np.dtype(DTYPE_OF_CODE[code]), lengths, offsets_bytes, document_index


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


class IndexedWriter:
    """Writes one token set; as a context manager, whole or not at all.

        with IndexedWriter("corpus_text_document", token_dtype(64000)) as writer:
            writer.add_document(ids, [len(ids)])

    Everything goes to temporary names beside the final ones. Leaving the block renames them, the .idx
    last, because a set without it is none; leaving it by an exception removes them. A disk that is
    full or a folder that cannot be written to raises UserError.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type[np.integer]) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self.n_tokens = 0
        self.n_documents = 0
        self._lengths: list[np.ndarray] = []
        self._sequences_per_document: list[np.ndarray] = []
        self._staging = _Staging()
        self._sealed = False
        self._bin = self._staging.create(f"{self.prefix}.bin")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._staging.discard()
            return
        try:
            if not self._sealed:
                self.seal()
            self._staging.publish()
        except BaseException:
            self._staging.discard()
            raise

    def add_document(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        """Append one document of `ids`, cut into sequences of `lengths` tokens."""
        self._append(ids, np.asarray(lengths, np.int32), np.array([len(lengths)], np.int64))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append many documents at once: of `ids`, the first lengths[0] tokens are the first, and so on.

        A length of 0 is a document with no sequence, which is what Megatron-LM writes for an empty text.
        """
        lengths = np.asarray(lengths, np.int32)
        self._append(ids, lengths[lengths > 0], (lengths > 0).astype(np.int64))

    def _append(self, ids: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray) -> None:
        if len(ids) != lengths.sum(dtype=np.int64):
            raise ValueError(f"{len(ids)} ids do not fill sequences of {lengths.sum(dtype=np.int64)} tokens")
        with _writing(self._bin.name):
            self._bin.write(_as_dtype(ids, self.dtype).data)
        self._lengths.append(lengths)
        self._sequences_per_document.append(sequences_per_document)
        self.n_tokens += len(ids)
        self.n_documents += len(sequences_per_document)

    def seal(self, manifest: dict[str, Any] | None = None) -> None:
        """Finish the files, still under their temporary names; the .json too where `manifest` is given.

        Sealing several sets before any is renamed keeps a full disk from leaving some behind.
        """
        with _writing(self._bin.name):
            self._bin.close()
        if manifest is not None:
            self._staging.write(f"{self.prefix}.json", [_manifest_bytes(manifest)])
        self._staging.write(f"{self.prefix}.idx", self._index_parts())
        self._sealed = True

    def _index_parts(self) -> Iterator[bytes | memoryview]:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        offsets_bytes = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets_bytes[1:])
        offsets_bytes *= self.dtype.itemsize
        document_index = np.zeros(self.n_documents + 1, "<i8")
        np.cumsum(np.concatenate([np.empty(0, "<i8"), *self._sequences_per_document]), out=document_index[1:])
        code = CODE_OF_DTYPE[self.dtype]
        yield HEADER.pack(MAGIC, 1, code, len(lengths), len(document_index))
        yield from (lengths.data, offsets_bytes.data, document_index.data)


def _as_dtype(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`ids` as contiguous `dtype`; an id that does not fit is an error, where a cast would wrap around."""
    ids = np.asarray(ids)
    limits = np.iinfo(dtype)
    if ids.dtype != dtype and ids.size and not (limits.min <= ids.min() and ids.max() <= limits.max):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {dtype}")
    return np.ascontiguousarray(ids, dtype)


def write_manifest(prefix: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Write PREFIX.json, whole or not at all."""
    staging = _Staging()
    try:
        staging.write(f"{os.fspath(prefix)}.json", [_manifest_bytes(manifest)])
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


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    content = {"format": MANIFEST_FORMAT, **manifest}
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


class _Staging:
    """Files that are written under temporary names and then appear together, in the order of their making."""

    def __init__(self) -> None:
        self._final_of: dict[str, str] = {}
        self._open: list[BinaryIO] = []
        self._published: list[str] = []

    def create(self, final: str) -> BinaryIO:
        """Open the file that will be `final`."""
        # The process id keeps two runs that write the same set from writing into one file.
        temporary = f"{final}.{os.getpid()}.tmp"
        with _writing(final):
            file = open(temporary, "wb")
        self._open.append(file)
        self._final_of[temporary] = final
        return file

    def write(self, final: str, parts: Sequence[bytes] | Iterator[bytes | memoryview]) -> None:
        """Make the file that will be `final` out of `parts`."""
        file = self.create(final)
        with _writing(final), file:
            for part in parts:
                file.write(part)

    def publish(self) -> None:
        """Rename. An older set of the name goes first, so that no moment mixes its files with the new."""
        for final in reversed(self._final_of.values()):
            with _writing(final), contextlib.suppress(FileNotFoundError):
                os.remove(final)
        for temporary, final in self._final_of.items():
            with _writing(final):
                self._published.append(final)
                os.replace(temporary, final)

    def discard(self) -> None:
        """Remove whatever is there."""
        for file in self._open:
            with contextlib.suppress(OSError):  # a full disk fails again on close; the file goes anyway
                file.close()
        for path in (*self._final_of, *self._published):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a token set is PREFIX.bin and PREFIX.idx") from None


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
