"""The encoder in C++ (data/native): SentencePiece's ids for BPE models, many times faster.

It reads the lines that are plain JSON itself. The first line that is anything else ends its turn: Python
reads that one, so that what is a document, and what is said of a line that is none, is decided in one
place. Memory: 4 MB of tables, which forked workers share, 14 MiB of caches a worker, and what the largest
chunk becomes.
"""

from __future__ import annotations

from typing import Any

from megatron.pretrain.data import _native
from megatron.pretrain.data.documents import Chunk, read_texts
from megatron.pretrain.data.encoded import EncodedTexts
from megatron.pretrain.data.parts import token_format
from megatron.pretrain.data.self_check import SelfCheck
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import SentencePieceTokenizer

Declined = _native.Declined
"""Raised for a model that the native encoder does not cover; says why."""


class NativeEncoder:
    """An Encoder of `SentencePieceTokenizer`'s ids that checks a sample of its work against it."""

    def __init__(self, tokenizer: SentencePieceTokenizer, keys: tuple[str, ...], append_eod: bool) -> None:
        end_id = tokenizer.eod_id if append_eod else None
        is_narrow = token_format(tokenizer.vocab_size).name == "uint16"
        make = _native.Encoder16 if is_narrow else _native.Encoder32
        self._made_of = tokenizer, keys, append_eod
        self._keys = keys
        self._native = make(tokenizer.model_bytes, list(keys), end_id)
        self._self_check = SelfCheck(tokenizer, self._native.whole_units, end_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeEncoder, self._made_of

    def __call__(self, chunk: Chunk) -> list[EncodedTexts]:
        data = chunk.read()
        self._native.clear()
        try:
            at = self._native.encode_lines(data, 0)
            while at < len(data):
                at = self._native.encode_lines(data, self._read_line(chunk, data, at))
        except _native.TooLong as why:
            raise UserError(f"{chunk.path}: the line at byte offset {chunk.start_byte}, or one soon after, has "
                            f"{why}; cut it into several") from None
        texts: list[EncodedTexts] = [self._native.take(number) for number in range(len(self._keys))]
        self._self_check(chunk, data, self._keys, texts)
        return texts

    def _read_line(self, chunk: Chunk, data: bytes, start: int) -> int:
        """Add the document of the line at `start`, if it is one; returns where the next line begins."""
        end = data.find(b"\n", start) + 1 or len(data)
        line = Chunk(chunk.path, chunk.start_byte + start, end - start,
                     ends_file=chunk.ends_file and end == len(data), data=data[start:end])
        for number, texts in enumerate(read_texts(line, self._keys)):
            for text in texts:
                self._native.encode_text(number, text)
        return end
