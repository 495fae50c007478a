"""Reading a token set from end to end: what opening it takes on trust is looked at here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.pretrain.data.indexed import IndexedTokens, blocks, map_index, read_manifest
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class Verified:
    """A set that is whole."""

    prefix: str
    documents: int
    tokens: int
    size_bytes: int


def verify(prefix: str, tokenizer: Tokenizer | None) -> Verified:
    """Read a set's index and tokens.

    Raises UserError where the index is not that of its documents, the manifest counts otherwise or names
    another tokenizer, or a token is none of the tokenizer's.
    """
    source = IndexedTokens(prefix)
    _check_offsets(source)
    _check_documents(source)
    _check_manifest(source, tokenizer)
    if tokenizer is not None:
        _check_tokens(source, tokenizer.vocab_size)
    return Verified(source.prefix, source.n_documents, source.n_tokens, source.tokens.nbytes)


def _check_offsets(source: IndexedTokens) -> None:
    _, lengths, offsets_bytes, _ = map_index(source.prefix)
    begin_bytes = 0
    for of_lengths, of_offsets in zip(blocks(lengths), blocks(offsets_bytes)):
        ends = begin_bytes + np.cumsum(of_lengths, dtype=np.int64) * source.dtype.itemsize
        expected = np.concatenate([[begin_bytes], ends[:-1]])
        if of_lengths.min() < 0 or not np.array_equal(of_offsets, expected):
            raise UserError(f"{source.prefix}.idx: its sequences do not follow one another; it is damaged, "
                            "so write it again")
        begin_bytes = int(ends[-1])


def _check_documents(source: IndexedTokens) -> None:
    last = 0
    for block in blocks(source.document_index):
        if block[0] < last or (np.diff(block) < 0).any():
            raise UserError(f"{source.prefix}.idx: its documents are not in order; it is damaged, so write "
                            "it again")
        last = int(block[-1])


def _check_manifest(source: IndexedTokens, tokenizer: Tokenizer | None) -> None:
    manifest = read_manifest(source.prefix) or {}
    for name, here in (("documents", source.n_documents), ("tokens", source.n_tokens)):
        if manifest.get(name, here) != here:
            raise UserError(f"{source.prefix}.json: counts {manifest[name]:,} {name} where the .idx has "
                            f"{here:,}; the files are of different runs, so preprocess again")
    made_with = manifest.get("tokenizer", {})
    if tokenizer and made_with.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{source.prefix}.json: the data was made with another tokenizer than the one given: "
                        "preprocess it again, or name the tokenizer it was made with")


def _check_tokens(source: IndexedTokens, vocab_size: int) -> None:
    for number, block in enumerate(blocks(source.tokens)):
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            raise UserError(f"{source.prefix}.bin: holds token {low if low < 0 else high} near byte "
                            f"{number * block.nbytes:,}, and the tokenizer has {vocab_size:,} ids; it is "
                            "damaged, or was made with another tokenizer")
