"""Samples to train on: windows of seq_length tokens of one or many sources, found by number alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron.pretrain.data.indexed import IndexedTokens, read_manifest
from megatron.pretrain.data.blend import Blended
from megatron.pretrain.data.order import Blend, apportion, windows_for_tokens
from megatron.pretrain.data.windows import SourceWindows, split_documents
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer


class PretrainDataset:
    """Samples by their global number, ready to be stacked into micro-batches.

    Attributes:
        max_samples: samples that there are, or None where they repeat for ever.
    """

    def __init__(self, sources: Sequence[SourceWindows], blend: Blend, *, eod_id: int, vocab_size: int,
                 eod_mask_loss: bool, description: dict[str, Any]) -> None:
        self.sources = tuple(sources)
        self.blend = blend
        self.seq_length = self.sources[0].seq_length
        self.max_samples = blend.max_samples
        self._eod_id = eod_id
        self._vocab_size = vocab_size
        self._eod_mask_loss = eod_mask_loss
        self._description = description

    def content_hash(self) -> str:
        """Sha256 (hex) over what decides which tokens sample i is: sources, weights, seed, lengths, EOD.

        Folders do not count, only the names of the files in them: data may be moved between runs.
        """
        return hashlib.sha256(orjson.dumps(self._description, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def check_holds(self, samples: int, flag: str = "--train-iters") -> None:
        """Raise UserError if `flag` asks for more samples than there are."""
        if self.max_samples is not None and samples > self.max_samples:
            raise UserError(
                f"{flag}: asks for {samples} samples of {self.seq_length} tokens, and the weights of "
                f"--data-path allow {self.max_samples} for this part of --split: lower it, raise the rounds "
                "of the mixture, or let sources repeat with --data-weights relative")

    def samples(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read samples by number.

        Args:
            indices: global sample numbers, int64 [k].

        Returns:
            tokens, int64 [k, S + 1]: inputs are [:, :-1], labels [:, 1:]; EOD beyond a source's end.
            loss_mask, float32 [k, S]: 0 beyond a source's end and, with eod_mask_loss, where the input
            is EOD (as megatron-core's GPTDataset does); 1 elsewhere.

        Raises:
            UserError: a sample beyond `max_samples`, or a token beyond the vocabulary.
        """
        source_numbers, epochs, windows = self.blend.locate(indices)
        tokens = np.full((len(windows), self.seq_length + 1), self._eod_id, dtype=np.int64)
        loss_mask = np.ones((len(windows), self.seq_length), dtype=np.float32)
        places = zip(source_numbers.tolist(), epochs.tolist(), windows.tolist(), strict=True)
        for row, (source, epoch, window) in enumerate(places):
            count = self.sources[source].read(window, epoch, tokens[row])
            loss_mask[row, count - 1:] = 0.0
            self._check_vocabulary(source, tokens[row])
        if self._eod_mask_loss:
            loss_mask[tokens[:, :-1] == self._eod_id] = 0.0
        return tokens, loss_mask

    def _check_vocabulary(self, source: int, tokens: np.ndarray) -> None:
        # An embedding on a GPU answers such a token with a device assert that names nothing.
        if tokens.max() >= self._vocab_size:
            raise UserError(
                f"{self.sources[source].source.prefix}: holds token {tokens.max()}, and the tokenizer has "
                f"{self._vocab_size} ids: the data was made with another one; preprocess it with this one")


def open_dataset(blended: Sequence[Blended], *, tokenizer: Tokenizer, seq_length: int, seed: int,
                 data_weights: str = "relative", enable_shuffle: bool = False, eod_mask_loss: bool = False,
                 split: str = "1000,0,0", part: str = "train") -> PretrainDataset:
    """Open the sources of a blend as one dataset.

    Args:
        blended: prefixes and weights, of which either all or none are None. Without weights a pass
            holds one epoch of every source, and passes repeat.
        tokenizer: the run's; data whose manifest names another is refused.
        seq_length: tokens a sample.
        seed: decides the order.
        data_weights: "relative": weights are shares of an endless stream, and a pass holds as many
            windows as all sources together. "tokens": weights are tokens to train on, and there is one
            pass, in which a source of T tokens and weight w gives w / S windows and never more than
            w / T epochs, rounded up to a window.
        enable_shuffle: shuffle documents; their order is kept otherwise. Windows are always shuffled.
        eod_mask_loss: no loss where the input is EOD.
        split: proportions of training, validation and test documents of each source.
        part: "train", "valid" or "test"; of a split source it takes its share of a weight in tokens.

    Raises:
        UserError: a source is unreadable, empty or made with another tokenizer, or a weight makes no sense.
    """
    _check_weights(blended, data_weights)
    indexed = [_open_source(source.prefix, tokenizer) for source in blended]
    sources = [
        SourceWindows(source, seq_length, documents=split_documents(split, part, source.n_documents),
                      shuffle_key=(seed, number) if enable_shuffle else None)
        for number, source in enumerate(indexed)]
    blend = Blend([source.windows_per_epoch for source in sources],
                  _windows_per_pass(sources, [source.weight for source in blended], data_weights),
                  seed=seed, repeats=data_weights == "relative")
    description = {
        "sources": [_describe(source, of_blend.weight)
                    for source, of_blend in zip(indexed, blended, strict=True)],
        "seed": seed, "seq_length": seq_length, "data_weights": data_weights,
        "enable_shuffle": enable_shuffle, "eod_id": tokenizer.eod_id, "split": split, "part": part}
    return PretrainDataset(sources, blend, eod_id=tokenizer.eod_id, vocab_size=tokenizer.vocab_size,
                           eod_mask_loss=eod_mask_loss, description=description)


def _check_weights(blended: Sequence[Blended], data_weights: str) -> None:
    if not blended:
        raise UserError("--data-path: names no dataset")
    if all(source.weight is None for source in blended):
        if data_weights == "tokens":
            raise UserError(
                "--data-weights tokens: --data-path has no weights; give pairs of tokens and prefix")
        return
    for source in blended:
        if source.weight is None or not 0 <= source.weight < math.inf:
            raise UserError(
                f"--data-path: the weight of {source.prefix} is {source.weight}; it must be 0 or more")
        if data_weights == "tokens" and source.weight != int(source.weight):
            raise UserError(
                f"--data-weights tokens: the weight of {source.prefix} is {source.weight}, and must be a "
                "whole number of tokens; shares are --data-weights relative")
    if not any(source.weight for source in blended):
        raise UserError("--data-path: every weight is 0")


def _windows_per_pass(sources: Sequence[SourceWindows], weights: Sequence[float | None],
                      data_weights: str) -> Sequence[int]:
    epochs = [source.windows_per_epoch for source in sources]
    if weights[0] is None:
        return epochs
    if data_weights == "relative":
        return apportion(sum(epochs), weights)
    return [_windows_of_weight(source, int(weight)) for source, weight in zip(sources, weights, strict=True)]


def _windows_of_weight(source: SourceWindows, weight_tokens: int) -> int:
    share_tokens = -(-weight_tokens * source.n_tokens // source.source.n_tokens)
    return windows_for_tokens(share_tokens, source.n_tokens, source.windows_per_epoch, source.seq_length)


def _open_source(prefix: str, tokenizer: Tokenizer) -> IndexedTokens:
    source = IndexedTokens(prefix)
    made_with = _tokenizer_of(source)
    for name, here in (("eod_id", tokenizer.eod_id), ("fingerprint", tokenizer.fingerprint)):
        there = made_with.get(name, here)
        if there != here:
            raise UserError(
                f"{source.prefix}.json: the data was made with a tokenizer whose {name} is {there}, and this "
                f"run's is {here}: preprocess the data again, or name the tokenizer it was made with")
    return source


def _tokenizer_of(source: IndexedTokens) -> dict[str, Any]:
    """What the manifest says of the tokenizer; nothing where there is none, as with Megatron-LM's data."""
    return (read_manifest(source.prefix) or {}).get("tokenizer", {})


def _describe(source: IndexedTokens, weight: float | None) -> dict[str, Any]:
    return {"name": Path(source.prefix).name, "tokens": source.n_tokens, "documents": source.n_documents,
            "dtype": source.dtype.name, "weight": weight,
            "tokenizer": _tokenizer_of(source).get("fingerprint")}
