"""An interpolated bigram model: the yardstick that a trained network has to be below.

    p(next | previous) = w2 c(previous next) / c(previous) + w1 c(next) / N + w0 / V

(Jelinek and Mercer, 1980). The weights w come from expectation-maximisation on a twentieth of the training
tokens that the counts leave out; then everything is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 2000     # left out in contiguous pieces, as unseen text comes
LEFT_OUT_OF = 20
EM_STEPS = 50


@dataclass(frozen=True)
class Stream:
    """Training tokens, 1-D integers, and how often the run passes over them."""

    tokens: np.ndarray
    rounds: float


@dataclass(frozen=True)
class Counts:
    """How often pairs and single tokens occur, each pass over a stream counted."""

    vocab_size: int
    pair_keys: np.ndarray       # previous * V + next, sorted, int64
    pair_counts: np.ndarray     # float64
    previous_counts: np.ndarray     # (V,): as the first of a pair
    token_counts: np.ndarray        # (V,)

    def components(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """(3, n): bigram, unigram and uniform probability of each following token.

        After a token that was never followed by another, the bigram's is the unigram's.
        """
        unigram = self.token_counts[following] / self.token_counts.sum()
        keys = previous.astype(np.int64) * self.vocab_size + following
        place = np.minimum(np.searchsorted(self.pair_keys, keys), len(self.pair_keys) - 1)
        pairs = np.where(self.pair_keys[place] == keys, self.pair_counts[place], 0.0)
        seen = self.previous_counts[previous]
        bigram = np.where(seen > 0, pairs / np.maximum(seen, 1e-30), unigram)
        return np.stack([bigram, unigram, np.full(len(keys), 1 / self.vocab_size)])


def count(streams: Sequence[Stream], vocab_size: int) -> Counts:
    """Count the pairs and tokens of `streams`; no pair crosses from one stream into another."""
    keys, weights = [], []
    token_counts = np.zeros(vocab_size)
    for stream in streams:
        tokens = stream.tokens.astype(np.int64)
        token_counts += stream.rounds * np.bincount(tokens, minlength=vocab_size)
        pairs, occurrences = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        keys.append(pairs)
        weights.append(stream.rounds * occurrences)
    pair_keys, where = np.unique(np.concatenate(keys), return_inverse=True)
    pair_counts = np.bincount(where, np.concatenate(weights))
    previous_counts = np.bincount(pair_keys // vocab_size, pair_counts, minlength=vocab_size)
    return Counts(vocab_size, pair_keys, pair_counts, previous_counts, token_counts)


@dataclass(frozen=True)
class InterpolatedBigram:
    """Counts and the three weights, which sum to 1."""

    counts: Counts
    weights: np.ndarray

    def loss(self, previous: np.ndarray, following: np.ndarray) -> float:
        """Mean cross entropy of the following tokens, in nats."""
        return float(-np.log(self.weights @ self.counts.components(previous, following)).mean())


def fit(streams: Sequence[Stream], vocab_size: int) -> InterpolatedBigram:
    """Fit counts and weights to the training tokens."""
    kept, left_out = [], []
    for stream in streams:
        # Cut before its rounds are counted: a repeated stream must not see its left-out part again.
        blocks = np.array_split(stream.tokens, max(LEFT_OUT_OF, len(stream.tokens) // BLOCK_TOKENS))
        for number, block in enumerate(blocks):
            (left_out if number % LEFT_OUT_OF == 0 else kept).append(Stream(block, stream.rounds))
    partial = count(kept, vocab_size)
    parts = [partial.components(one.tokens[:-1], one.tokens[1:]) for one in left_out]
    importance = np.concatenate([np.full(part.shape[1], one.rounds) for part, one in zip(parts, left_out)])
    weights = best_weights(np.concatenate(parts, axis=1), importance)
    return InterpolatedBigram(count(streams, vocab_size), weights)


def best_weights(components: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The mixture weights (3,) under which `components` (3, n) make the text most likely, by EM."""
    weights = np.full(len(components), 1 / len(components))
    for _ in range(EM_STEPS):
        shares = weights[:, None] * components
        weights = (shares / shares.sum(axis=0)) @ importance / importance.sum()
    return weights
