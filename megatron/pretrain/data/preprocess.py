"""JSON lines to token sets: PREFIX_KEY_document for each key, the same bytes for any number of workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain import __version__
from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.documents import BadDocument, Chunk, Source, cut_into_chunks, open_source
from megatron.pretrain.data.encoders import Encoder, choose_encoder
from megatron.pretrain.data.indexed import IndexedWriter, token_dtype
from megatron.pretrain.data.progress import ByteProgress
from megatron.pretrain.data.workers import OrderedWorkers
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer

CHUNK_BYTES = 1 << 20
"""Enough to hide the cost of handing a chunk over, little enough to keep every worker busy to the end."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to tokenize, how, and where to."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class DatasetSummary:
    """What became of one key."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    """The texts alone, in UTF-8."""


@dataclass(frozen=True)
class Summary:
    """What a run read and wrote."""

    datasets: tuple[DatasetSummary, ...]
    input_bytes: int
    seconds: float


def preprocess(config: PreprocessConfig) -> Summary:
    """Write one token set a key, in the order of the input; all of them, or none where anything is wrong.

    Raises UserError for whatever the user can mend: a bad line, a missing file, a tokenizer that is none,
    an output that cannot be written, a worker that was killed.
    """
    started = time.monotonic()
    sources = [open_source(path) for path in config.inputs]
    tokenizer = build_tokenizer(config.tokenizer)
    prefixes = [f"{config.output_prefix}_{key}_document" for key in config.json_keys]
    _check_outputs(config, prefixes)
    encoder, which = choose_encoder(tokenizer, config.json_keys, config.append_eod)
    print(which, flush=True)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)))
                   for prefix in prefixes]
        text_bytes = _encode_all(config, sources, encoder, writers)
        if not writers[0].n_documents:
            raise UserError(f"--input {' '.join(config.inputs)}: holds no document")
        for writer, key in zip(writers, config.json_keys):
            writer.seal(_manifest(config, tokenizer, sources, key, writer))
    datasets = tuple(DatasetSummary(writer.prefix, writer.n_documents, writer.n_tokens, size_bytes)
                     for writer, size_bytes in zip(writers, text_bytes))
    return Summary(datasets, _total_bytes(sources), time.monotonic() - started)


def _encode_all(config: PreprocessConfig, sources: Sequence[Source], encoder: Encoder,
                writers: Sequence[IndexedWriter]) -> list[int]:
    """Fill the writers; returns the bytes of text for each."""
    total_bytes = _total_bytes(sources)
    text_bytes = [0] * len(writers)
    count = max(1, min(config.workers, -(-total_bytes // config.chunk_bytes)))
    # The workers start before the bar does: a process with threads should not be forked.
    with OrderedWorkers(count, encoder) as workers, ByteProgress("preprocessing", total_bytes) as progress:
        try:
            for chunk, encoded in workers.map(_chunks(sources, config.chunk_bytes)):
                for number, (writer, texts) in enumerate(zip(writers, encoded)):
                    writer.add_documents(texts.tokens, texts.lengths)
                    text_bytes[number] += texts.text_bytes
                progress.advance(chunk.size_bytes)
        except BadDocument as bad:
            raise bad.as_user_error() from None
    return text_bytes


def _chunks(sources: Sequence[Source], chunk_bytes: int) -> Iterator[Chunk]:
    for source in sources:
        yield from cut_into_chunks(source, chunk_bytes)


def _total_bytes(sources: Sequence[Source]) -> int:
    return sum(source.size_bytes for source in sources)


def _check_outputs(config: PreprocessConfig, prefixes: Sequence[str]) -> None:
    flag = f"--output-prefix {config.output_prefix}"
    folder = Path(config.output_prefix).parent
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is no folder; make it first")
    inputs = {os.path.realpath(path) for path in config.inputs}
    for prefix in prefixes:
        for output in (f"{prefix}{ending}" for ending in (".bin", ".idx", ".json")):
            if os.path.realpath(output) in inputs:
                raise UserError(f"{flag}: {output} is also an input and would be overwritten; "
                                "choose another prefix")


def _manifest(config: PreprocessConfig, tokenizer: Tokenizer, sources: Sequence[Source], key: str,
              writer: IndexedWriter) -> dict[str, Any]:
    return {
        "tool_version": __version__,
        "tokenizer": {
            "type": config.tokenizer.tokenizer_type, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
        "json_key": key,
        "append_eod": config.append_eod,
        "sources": [{"path": source.path, "size_bytes": source.size_bytes} for source in sources],
        "documents": writer.n_documents,
        "tokens": writer.n_tokens,
        "dtype": writer.dtype.name,
    }
