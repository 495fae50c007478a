"""What an encoder makes of a chunk, for one key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class EncodedTexts(Protocol):
    """One key's texts of a chunk. A document is one sequence, or none where its text is empty.

    tokens, sequences, documents: how many there are.
    text_bytes: of the texts alone, in UTF-8.
    longest: the number of the document with the most tokens; of no meaning where there is none.
    """

    tokens: int
    sequences: int
    documents: int
    text_bytes: int
    longest: int

    def length_of(self, document: int) -> int:
        """How many ids a document has."""

    def ids_of(self, document: int, first: int) -> list[int]:
        """The first ids of a document, at most `first`."""

    def entries(self, tokens: int, sequences: int) -> Sequence[bytes | memoryview]:
        """As they lie in the parts of a set (`parts.Entries`), after so many tokens and sequences."""


class Counts(NamedTuple):
    """How much a chunk adds to one key's set."""

    tokens: int
    sequences: int
    documents: int
    text_bytes: int


def count(texts: EncodedTexts) -> Counts:
    return Counts(texts.tokens, texts.sequences, texts.documents, texts.text_bytes)
