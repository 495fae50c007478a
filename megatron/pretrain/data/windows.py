"""One source as windows of tokens: which documents, in which order, cut where."""

from __future__ import annotations

import re
import threading

import numpy as np

from megatron.pretrain.data.indexed import IndexedTokens
from megatron.pretrain.data.order import permute
from megatron.pretrain.errors import UserError

_PARTS = ("train", "valid", "test")
_DOCUMENTS_PER_MARK = 256
_DOCUMENTS_AT_ONCE = 1 << 20


def split_documents(split: str, part: str, n_documents: int) -> range:
    """The documents of a source that belong to one part of the data, as Megatron-LM splits them.

    Args:
        split: proportions of training, validation and test, such as "969,30,1"; missing ones are 0.
        part: "train", "valid" or "test".
        n_documents: documents of the source.

    Returns:
        A contiguous range; the three parts follow one another and cover the source.

    Raises:
        UserError: `split` is not one to three proportions with a positive sum.
    """
    words = [word for word in re.split(r"[,/\s]+", split.strip()) if word]
    try:
        proportions = [float(word) for word in words]
    except ValueError:
        proportions = []
    total = sum(proportions)
    if not 1 <= len(proportions) <= len(_PARTS) or min(proportions) < 0 or not 0 < total < float("inf"):
        raise UserError(
            f"--split {split}: give one to three proportions of training, validation and test documents, "
            "none negative and one above 0, such as 969,30,1")
    proportions += [0.0] * (len(_PARTS) - len(proportions))
    number = _PARTS.index(part)
    begin = sum(proportions[:number]) / total
    end = sum(proportions[:number + 1]) / total
    return range(round(begin * n_documents), round(end * n_documents))


class SourceWindows:
    """One source's documents as one stream of tokens, cut into windows of `seq_length` inputs.

    Window j of an epoch covers tokens j * S to j * S + S of the stream: S inputs and, one to the right,
    their S labels; the last token is also the first input of window j + 1. So over the
    ceil((n_tokens - 1) / S) windows of an epoch each token of the stream but the first is a label
    exactly once. The last window ends where the stream ends, and may be shorter.

    Args:
        source: the tokens.
        seq_length: S.
        documents: the range of documents that make up the stream; all of them unless given.
        shuffle_key: with it, each epoch has its documents in an order of its own, drawn from this key;
            without, in the order of the file, where a window is one slice of the memory map.

    Raises:
        UserError: the stream has fewer than two tokens.
    """

    def __init__(self, source: IndexedTokens, seq_length: int, *, documents: range | None = None,
                 shuffle_key: tuple[int, ...] | None = None) -> None:
        documents = range(source.n_documents) if documents is None else documents
        self.source = source
        # A view without memmap's bookkeeping on every slice.
        self._tokens = np.asarray(source.tokens)
        self.seq_length = seq_length
        self._documents = documents
        self._shuffle_key = shuffle_key
        self._first_token = _tokens_before(source, documents.start)
        self.n_tokens = _tokens_before(source, documents.stop) - self._first_token
        if self.n_tokens < 2:
            raise UserError(
                f"{source.prefix}: {len(documents)} of its {source.n_documents} documents are in this part "
                f"of --split, with {self.n_tokens} tokens; a source needs at least 2")
        self.windows_per_epoch = -(-(self.n_tokens - 1) // seq_length)
        self._document_starts: np.ndarray | None = None
        self._epochs: dict[int, _ShuffledDocuments] = {}
        self._lock = threading.Lock()

    def read(self, window: int, epoch: int, out: np.ndarray) -> int:
        """Write a window's tokens into `out` [S + 1] and return how many there are, 2 to S + 1."""
        begin = window * self.seq_length
        end = min(begin + self.seq_length + 1, self.n_tokens)
        if self._shuffle_key is None:
            stream = self._tokens[self._first_token + begin:self._first_token + end]
        else:
            stream = self._tokens[self._shuffled(epoch).positions(begin, end)]
        out[:end - begin] = stream
        return end - begin

    def _shuffled(self, epoch: int) -> _ShuffledDocuments:
        with self._lock:
            if self._document_starts is None:
                self._document_starts = _document_starts(self.source, self._documents)
            if epoch not in self._epochs:
                # One number more than the key of the epoch's windows, so that the two orders differ.
                key = (*self._shuffle_key, epoch, 0)
                self._epochs[epoch] = _ShuffledDocuments(self._document_starts, key)
            return self._epochs[epoch]


def _tokens_before(source: IndexedTokens, document: int) -> int:
    if document == source.n_documents:
        return source.n_tokens
    return int(source.sequence_lengths[:source.document_index[document]].sum(dtype=np.int64))


def _document_starts(source: IndexedTokens, documents: range) -> np.ndarray:
    """First token of each document of the range, and of the one after it: int64 [len(documents) + 1]."""
    sequence_starts = np.zeros(len(source.sequence_lengths) + 1, dtype=np.int64)
    np.cumsum(source.sequence_lengths, dtype=np.int64, out=sequence_starts[1:])
    return sequence_starts[source.document_index[documents.start:documents.stop + 1]]


class _ShuffledDocuments:
    """Documents one after another in a pseudo-random order, without holding that order.

    It keeps only where every 256th document begins; the documents between two marks are found again
    from the permutation. So an epoch of 10^8 documents takes 3 MB instead of 1.6 GB.
    """

    def __init__(self, document_starts: np.ndarray, key: tuple[int, ...]) -> None:
        self._starts = document_starts
        self._n_documents = len(document_starts) - 1
        self._key = key
        lengths_between_marks = [
            np.add.reduceat(lengths, np.arange(0, len(lengths), _DOCUMENTS_PER_MARK))
            for first in range(0, self._n_documents, _DOCUMENTS_AT_ONCE)
            for _, lengths in [self._documents_at(first, first + _DOCUMENTS_AT_ONCE)]]
        self._marks = np.concatenate([[0], np.cumsum(np.concatenate(lengths_between_marks))])

    def _documents_at(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """First tokens in the source, and lengths, of the documents at these places of the order."""
        places = np.arange(begin, min(end, self._n_documents))
        documents = permute(places, self._n_documents, self._key)
        first_tokens = self._starts[documents]
        return first_tokens, self._starts[documents + 1] - first_tokens

    def positions(self, begin: int, end: int) -> np.ndarray:
        """Where tokens begin..end of the shuffled stream lie in the source: int64 [end - begin]."""
        first_mark = int(np.searchsorted(self._marks, begin, side="right")) - 1
        last_mark = int(np.searchsorted(self._marks, end, side="left"))
        first_tokens, lengths = self._documents_at(first_mark * _DOCUMENTS_PER_MARK,
                                                   last_mark * _DOCUMENTS_PER_MARK)
        ends = self._marks[first_mark] + np.cumsum(lengths)
        taken_from = np.maximum(begin, ends - lengths)
        taken = np.maximum(np.minimum(end, ends) - taken_from, 0)
        sources_of_runs = first_tokens + taken_from - (ends - lengths)
        places_of_runs = np.cumsum(taken) - taken
        return np.repeat(sources_of_runs - places_of_runs, taken) + np.arange(end - begin)
