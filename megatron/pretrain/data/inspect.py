"""Looking into a token set: its documents' lengths and texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.pretrain.data.indexed import IndexedTokens
from megatron.pretrain.errors import UserError


@dataclass(frozen=True)
class Bin:
    """Documents of `low` to `high` tokens (both included), and their tokens together."""

    low: int
    high: int
    documents: int
    tokens: int


def document_lengths(source: IndexedTokens) -> np.ndarray:
    """Tokens of each document, int64 [n_documents]."""
    sequence_ends = np.zeros(len(source.sequence_lengths) + 1, np.int64)
    np.cumsum(source.sequence_lengths, dtype=np.int64, out=sequence_ends[1:])
    return np.diff(sequence_ends[source.document_index])


def histogram(lengths: np.ndarray) -> list[Bin]:
    """Bins 0, 1, 2-3, 4-7 and so on, from the first to the last that is not empty."""
    # frexp is exact: 2**(e-1) <= length < 2**e.
    bins = np.frexp(lengths.astype(np.float64))[1]
    documents = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths)
    first = int(bins.min()) if len(bins) else 0
    return [Bin(1 << e - 1 if e else 0, (1 << e) - 1, int(documents[e]), int(tokens[e]))
            for e in range(first, len(documents))]


def document_tokens(source: IndexedTokens, number: int) -> np.ndarray:
    """The tokens of document `number`, from 0; negative ones count from the end. Raises UserError."""
    if not -source.n_documents <= number < source.n_documents:
        raise UserError(f"--doc {number}: {source.prefix} has documents 0 to {source.n_documents - 1}")
    number %= source.n_documents
    first, last = source.document_index[number:number + 2]
    begin = int(source.sequence_lengths[:first].sum(dtype=np.int64))
    return source.tokens[begin:begin + int(source.sequence_lengths[first:last].sum(dtype=np.int64))]
