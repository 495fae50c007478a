"""The encoder that any tokenizer has: its own library, one text at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.pretrain.data.documents import Chunk, read_texts
from megatron.pretrain.data.encoded import EncodedTexts
from megatron.pretrain.data.indexed import entries_of, token_dtype
from megatron.pretrain.data.parts import Entries, WriterPosition
from megatron.pretrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class LibraryEncoder:
    """orjson reads the lines, the tokenizer encodes the texts."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool

    def __call__(self, chunk: Chunk) -> list[EncodedTexts]:
        return [self._encode(texts) for texts in read_texts(chunk, self.keys)]

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        documents = [self.tokenizer.encode(text) for text in texts]
        if self.append_eod:
            for ids in documents:
                if ids:  # Megatron-LM ends no document that holds nothing
                    ids.append(self.tokenizer.eod_id)
        return ListedTexts(documents, sum(len(text.encode()) for text in texts),
                           token_dtype(self.tokenizer.vocab_size))


class ListedTexts:
    """EncodedTexts out of lists of ids."""

    def __init__(self, documents: Sequence[list[int]], text_bytes: int, dtype: np.dtype) -> None:
        self._ids, self._dtype = documents, dtype
        self._lengths = np.fromiter(map(len, documents), "<i4", len(documents))
        self.tokens = int(self._lengths.sum(dtype=np.int64))
        self.sequences = int((self._lengths > 0).sum())
        self.documents = len(documents)
        self.text_bytes = text_bytes
        self.longest = int(self._lengths.argmax()) if documents else 0

    def length_of(self, document: int) -> int:
        return len(self._ids[document])

    def ids_of(self, document: int, first: int) -> list[int]:
        return self._ids[document][:first]

    def entries(self, tokens: int, sequences: int) -> Entries:
        ids = np.fromiter(itertools.chain.from_iterable(self._ids), self._dtype, self.tokens)
        holds_ids = self._lengths > 0
        return entries_of(ids, self._lengths[holds_ids], np.cumsum(holds_ids, dtype="<i8"),
                          WriterPosition(tokens, sequences))
