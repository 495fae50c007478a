"""A sample of every run's documents, encoded again by the tokenizer's own library and compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from megatron.pretrain.data.documents import Chunk, read_texts
from megatron.pretrain.data.encoded import EncodedTexts
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer

CHUNKS_BETWEEN_SAMPLES = 8
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

    def __call__(self, chunk: Chunk, data: bytes, keys: Sequence[str],
                 encoded: Sequence[EncodedTexts]) -> None:
        """Raises UserError for the first sampled document whose ids differ.

        data: the chunk's lines.
        encoded: what became of them, for each key.
        """
        for document in set(self._choose(encoded[0])):
            line, start_byte = _line_of(data, document)
            start_byte += chunk.start_byte
            texts = read_texts(Chunk(chunk.path, start_byte, len(line), False, line), keys)
            for [text], column in zip(texts, encoded):
                self._compare(text, column, document, f"{chunk.path}, the line at byte offset {start_byte}")

    def _choose(self, texts: EncodedTexts) -> Iterator[int]:
        if not texts.documents:
            return
        if self._chunks == 0:
            yield 0
        if self._chunks % CHUNKS_BETWEEN_SAMPLES == 0:
            yield random.randrange(texts.documents)  # a fork seeds this one anew: each worker looks elsewhere
        self._chunks += 1
        longest = texts.longest
        # Twice as long as any before: so there are few of them, however long the run.
        if texts.length_of(longest) > 2 * self._longest_tokens:
            self._longest_tokens = texts.length_of(longest)
            yield longest

    def _compare(self, text: str, texts: EncodedTexts, document: int, where: str) -> None:
        excerpt = self._excerpt(text)
        right = self._tokenizer.encode(excerpt)
        if excerpt == text and right and self._end_id is not None:
            right.append(self._end_id)
        ids = texts.ids_of(document, len(right) if excerpt != text else texts.length_of(document))
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
