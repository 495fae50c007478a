"""A sample of every run's documents, encoded again by the tokenizer's own library and compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron.pretrain.data.documents import Chunk, read_texts
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer

CHUNKS_BETWEEN_SAMPLES = 16
EXCERPT_CHARACTERS = 1 << 12
"""Of a longer document so much is compared, which keeps the check under two hundredths of the work."""


class SelfCheck:
    """Compares documents of a worker's chunks: the first, each that is by far the longest, random ones.

    Args:
        tokenizer: whose ids are right.
        whole_units: cuts the end off a text, so that the rest's ids begin the ids of the text.
        end_id: what was put after documents that are not empty, if anything was.
    """

    def __init__(self, tokenizer: Tokenizer, whole_units: Callable[[str], str], end_id: int | None) -> None:
        self._tokenizer, self._whole_units, self._end_id = tokenizer, whole_units, end_id
        self._chunks = 0
        self._longest_tokens = 0
        self._random = random.Random()  # each run looks elsewhere

    def __call__(self, chunk: Chunk, data: bytes, keys: Sequence[str],
                 columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Raises UserError for the first sampled document whose ids differ.

        columns: for each key the tokens of the chunk's documents and how many each document has.
        """
        for document in set(self._choose(columns[0][1])):
            line, start_byte = _line_of(data, document)
            start_byte += chunk.start_byte
            texts = read_texts(Chunk(chunk.path, start_byte, len(line), False, line), keys)
            for [text], (tokens, lengths) in zip(texts, columns):
                start = int(lengths[:document].sum(dtype=np.int64))
                ids = tokens[start:start + int(lengths[document])]
                self._compare(text, ids, f"{chunk.path}, the line at byte offset {start_byte}")

    def _choose(self, lengths: np.ndarray) -> Iterator[int]:
        if not len(lengths):
            return
        if self._chunks == 0:
            yield 0
        if self._chunks % CHUNKS_BETWEEN_SAMPLES == 0:
            yield self._random.randrange(len(lengths))
        self._chunks += 1
        longest = int(lengths.argmax())
        # Twice as long as any before: so there are few of them, however long the run.
        if lengths[longest] > 2 * self._longest_tokens:
            self._longest_tokens = int(lengths[longest])
            yield longest

    def _compare(self, text: str, tokens: np.ndarray, where: str) -> None:
        excerpt = self._excerpt(text)
        right = self._tokenizer.encode(excerpt)
        if excerpt != text:
            tokens = tokens[:len(right)]
        elif right and self._end_id is not None:
            right.append(self._end_id)
        ids = tokens.tolist()
        if ids == right:
            return
        place = next((i for i, (ours, theirs) in enumerate(zip(ids, right)) if ours != theirs),
                     min(len(ids), len(right)))
        raise UserError(
            f"{where}: the native encoder and {type(self._tokenizer).__name__} differ from token {place} on "
            f"({ids[place:place + 3]} and {right[place:place + 3]}) in the text that begins {text[:60]!r}; "
            "this is a defect of the native encoder: please report it, and give --encoder library meanwhile")

    def _excerpt(self, text: str) -> str:
        size = EXCERPT_CHARACTERS
        while size < len(text):
            if excerpt := self._whole_units(text[:size]):
                return excerpt
            size *= 2
        return text


def _line_of(data: bytes, number: int) -> tuple[bytes, int]:
    """The line of this number, from 0, without its end, and where it begins."""
    start = 0
    for _ in range(number):
        start = data.index(b"\n", start) + 1
    end = data.find(b"\n", start)
    return data[start:len(data) if end < 0 else end], start
