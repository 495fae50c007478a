"""What turns a chunk of JSON lines into tokens, and the choice of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.pretrain.data.documents import Chunk, read_texts
from megatron.pretrain.data.indexed import token_dtype
from megatron.pretrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedTexts:
    """One key's texts of a chunk: the tokens end to end, and how many each document has (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


class Encoder(Protocol):
    """Turns a chunk of a file into tokens, for each key; runs inside the workers, so it can be pickled."""

    def __call__(self, chunk: Chunk) -> list[EncodedTexts]:
        """Raises BadDocument for the chunk's first line that is no document."""


@dataclass(frozen=True)
class PythonEncoder:
    """orjson reads the lines, the tokenizer encodes one text at a time."""

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
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        tokens = np.fromiter(itertools.chain.from_iterable(documents), token_dtype(self.tokenizer.vocab_size),
                             int(lengths.sum(dtype=np.int64)))
        return EncodedTexts(tokens, lengths, sum(len(text.encode()) for text in texts))


def choose_encoder(tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool) -> tuple[Encoder, str]:
    """The fastest encoder that gives `tokenizer`'s ids, and a line that says which it is and why."""
    return (PythonEncoder(tokenizer, keys, append_eod),
            f"encoder: {type(tokenizer).__name__}'s own library, one text at a time")
