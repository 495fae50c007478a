"""From token streams to samples: every token once an epoch, masks as the engine's, rounds as promised."""

from __future__ import annotations

import collections
import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from megatron.pretrain.data.dataset import open_dataset
from megatron.pretrain.data.indexed import IndexedTokens, IndexedWriter, write_manifest
from megatron.pretrain.data.blend import Blended
from megatron.pretrain.data.mixture import Mixture, Source
from megatron.pretrain.data.order import permute, windows_for_tokens
from megatron.pretrain.data.windows import SourceWindows, split_documents
from megatron.pretrain.errors import UserError

EOD = 0


@dataclasses.dataclass(frozen=True)
class Ids:
    """A tokenizer that is known only by its ids."""

    vocab_size: int = 1_000_000
    eod_id: int = EOD
    bos_id: int | None = None
    eos_id: int | None = None
    fingerprint: str = "ids"


@pytest.fixture
def write_source(tmp_path):
    """write_source(name, lengths, first) writes documents of ids from `first` on: an id is a place."""

    def write(name: str, lengths: list[int], *, first: int = 1, append_eod: bool = False) -> str:
        prefix = tmp_path / name
        prefix.parent.mkdir(exist_ok=True)
        with IndexedWriter(prefix, np.int32) as writer:
            for length in lengths:
                ids = np.arange(first, first + length, dtype=np.int32)
                first += length
                ids = np.append(ids, np.int32(EOD)) if append_eod else ids
                writer.add_documents(ids, np.array([len(ids)]))
        return str(prefix)

    return write


def _open(*blended: Blended, seq_length: int = 8, seed: int = 42, tokenizer: Ids = Ids(), **settings):
    return open_dataset(list(blended), tokenizer=tokenizer, seq_length=seq_length, seed=seed, **settings)


def _epoch(windows: SourceWindows, epoch: int) -> list[np.ndarray]:
    out = np.empty(windows.seq_length + 1, dtype=np.int64)
    return [out[: windows.read(window, epoch, out)].copy() for window in range(windows.windows_per_epoch)]


@pytest.mark.parametrize("shuffle_key", [None, (42, 0)])
@pytest.mark.parametrize("lengths", [[2], [1, 8], [3, 5, 0, 1, 8], [9] * 8, [1, 0, 30, 0, 2, 0], [1] * 1000])
@pytest.mark.parametrize("seq_length", [1, 7, 8, 100])
def test_each_token_but_the_first_is_a_label_once_an_epoch(write_source, lengths, shuffle_key, seq_length):
    source = IndexedTokens(write_source("a", lengths))
    windows = SourceWindows(source, seq_length, shuffle_key=shuffle_key)
    for epoch in (0, 1):
        epoch_windows = _epoch(windows, epoch)
        for before, after in zip(epoch_windows, epoch_windows[1:], strict=False):
            assert before[-1] == after[0]
            assert len(before) == seq_length + 1
        labels = np.concatenate([window[1:] for window in epoch_windows])
        stream = np.concatenate([epoch_windows[0][:1], labels])
        assert np.array_equal(np.sort(stream), np.arange(1, sum(lengths) + 1))


def test_documents_keep_their_order_by_default(write_source):
    windows = SourceWindows(IndexedTokens(write_source("a", [3, 4, 5, 6, 7])), 8)
    assert [window.tolist() for window in _epoch(windows, 0)] == [
        [*range(1, 10)], [*range(9, 18)], [*range(17, 26)]]


@pytest.mark.parametrize("n_documents", [1, 5, 255, 256, 257, 1500])
def test_shuffled_documents_stay_whole_and_follow_the_permutation(write_source, n_documents):
    lengths = np.random.default_rng(n_documents).integers(0, 9, n_documents).tolist() + [3]
    source = IndexedTokens(write_source("a", lengths))
    windows = SourceWindows(source, 16, shuffle_key=(1, 2))
    documents = np.split(source.tokens, np.cumsum(lengths)[:-1])
    for epoch in (0, 3):
        order = permute(np.arange(len(lengths)), len(lengths), (1, 2, epoch, 0))
        stream = np.concatenate([documents[document] for document in order])
        for number, window in enumerate(_epoch(windows, epoch)):
            assert np.array_equal(window, stream[16 * number : 16 * number + 17])


def test_a_range_of_documents_is_a_stream_of_its_own(write_source):
    source = IndexedTokens(write_source("a", [10, 10, 10, 10]))
    for key in (None, (1,)):
        windows = SourceWindows(source, 4, documents=range(1, 3), shuffle_key=key)
        seen = np.concatenate(_epoch(windows, 0))
        assert windows.n_tokens == 20
        assert set(seen) == set(range(11, 31))


def _reference_split(split: str, n_documents: int) -> list[range]:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    ends = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return [range(0) if end is None else
            range(int(round(end[0] * float(n_documents))), int(round(end[1] * float(n_documents))))
            for end in ends]


@pytest.mark.parametrize("split", ["1000,0,0", "969,30,1", "99,1", "0.9,0.05,0.05", "1,1,1", "0,1,0", "100"])
def test_the_split_is_megatrons(split):
    for n_documents in (1, 2, 3, 10, 101, 98_765):
        reference = _reference_split(split, n_documents)
        for part, expected in zip(("train", "valid", "test"), reference, strict=True):
            ours = split_documents(split, part, n_documents)
            assert ours == expected or not (ours or expected)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2,0", "nan,1,0", "inf,1,0"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(UserError, match="--split .*one to three proportions"):
        split_documents(split, "train", 10)


def test_masks_are_those_of_the_engine(write_source):
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    prefix = write_source("a", [3, 1, 7, 20, 2], append_eod=True)
    dataset = _open(Blended(prefix, None), eod_mask_loss=True)
    tokens, loss_mask = dataset.samples(np.arange(dataset.blend.samples_per_pass))
    windows = dataset.blend.locate(np.arange(len(tokens)))[2]
    for row, mask, window in zip(tokens, loss_mask, windows, strict=True):
        _, reference, _ = _get_ltor_masks_and_position_ids(
            torch.from_numpy(row[:-1]), EOD, False, False, True, False)
        labels_left = dataset.sources[0].n_tokens - 1 - 8 * window
        reference[max(0, labels_left):] = 0.0
        assert np.array_equal(mask, reference.numpy())


def test_without_eod_mask_only_the_padding_is_masked(write_source):
    dataset = _open(Blended(write_source("a", [3, 4, 4], append_eod=True), None), seq_length=9)
    tokens, loss_mask = dataset.samples(np.arange(2))
    last = int(np.argmin(loss_mask.sum(axis=1)))
    assert loss_mask.sum(axis=1).tolist()[1 - last] == 9
    assert loss_mask[last].tolist() == [1.0] * 4 + [0.0] * 5
    assert tokens[last].tolist() == [8, 9, 10, 11, EOD, EOD, EOD, EOD, EOD, EOD]
    assert (tokens.dtype, loss_mask.dtype) == (np.int64, np.float32)


def test_one_document_gives_the_samples_that_megatron_core_gives(write_source, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = EOD, -1, 1000, {"class": "Tokenizer"}

    prefix = write_source("a", [8 * 20 + 1])
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, tokenizer=Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"), split="1,0,0")
    theirs = GPTDataset(IndexedDataset(prefix), prefix, np.arange(1), None, Split.train, config)
    ours = _open(Blended(prefix, None))
    assert ours.blend.samples_per_pass == len(theirs) == 20
    tokens, _ = ours.samples(np.arange(20))
    assert sorted(map(tuple, tokens)) == sorted(
        (*theirs[i]["tokens"].tolist(), int(theirs[i]["labels"][-1])) for i in range(20))


def test_weights_in_tokens_never_run_past_their_rounds(write_source):
    """1201 of 801 tokens are 1.5 rounds, 644 of 161 are 4: no window is seen more often than ceil(rounds)."""
    long, short = write_source("long", [801]), write_source("short", [100, 61], first=10_000)
    dataset = _open(Blended(long, 1201.0), Blended(short, 161 * 4.0), data_weights="tokens")
    assert dataset.max_samples == 150 + 80
    sources, epochs, windows = dataset.blend.locate(np.arange(dataset.max_samples))
    seen = collections.Counter(zip(sources.tolist(), windows.tolist(), strict=True))
    assert {source: max(n for (s, _), n in seen.items() if s == source) for source in (0, 1)} == {0: 2, 1: 4}
    assert np.array_equal(np.unique(windows[(sources == 0) & (epochs == 0)]), np.arange(100))
    with pytest.raises(UserError, match="--train-iters: asks for 231 samples of 8 tokens.* allow 230 "):
        dataset.check_holds(231)
    dataset.check_holds(230)


def test_a_split_takes_its_share_of_a_weight_in_tokens(write_source):
    prefix = write_source("a", [17] * 10)
    train, valid = (_open(Blended(prefix, 340.0), data_weights="tokens", split="8,2,0", part=part)
                    for part in ("train", "valid"))
    assert (train.max_samples, valid.max_samples) == (34, 9)


def test_relative_weights_give_their_shares_for_ever(write_source):
    a, b = write_source("a", [81]), write_source("b", [801], first=10_000)
    dataset = _open(Blended(a, 0.3), Blended(b, 0.7))
    assert dataset.max_samples is None
    assert np.bincount(dataset.blend.locate(np.arange(110))[0]).tolist() == [33, 77]
    assert np.bincount(dataset.blend.locate(np.arange(1100, 1210))[0]).tolist() == [33, 77]


def test_no_weights_give_each_source_once_a_pass(write_source):
    a, b = write_source("a", [81]), write_source("b", [161], first=10_000)
    dataset = _open(Blended(a, None), Blended(b, None))
    tokens, _ = dataset.samples(np.arange(30))
    assert sorted(tokens[:, 1:].ravel()) == [*range(2, 82), *range(10_001, 10_161)]


def test_a_sample_is_the_same_however_it_is_asked_for(write_source):
    a, b = write_source("a", [50, 60, 70]), write_source("b", [40], first=500)

    def read(*samples: int) -> np.ndarray:
        dataset = _open(Blended(a, 2.0), Blended(b, 1.0), enable_shuffle=True)
        return dataset.samples(np.array(samples))[0]

    together = read(*range(200))
    alone = np.concatenate([read(199), read(0), read(57)])
    assert np.array_equal(together[[199, 0, 57]], alone)


def test_the_content_hash_tells_apart_what_changes_the_samples(write_source):
    a, moved, other = (write_source(name, [50, 60, 70]) for name in ("a", "folder/a", "b"))
    bigger = write_source("bigger/a", [50, 60, 71])
    base = _open(Blended(a, 1.0)).content_hash()
    assert len(base) == 64
    assert _open(Blended(moved, 1.0)).content_hash() == base
    different = {
        _open(Blended(other, 1.0)).content_hash(),
        _open(Blended(bigger, 1.0)).content_hash(),
        _open(Blended(a, 2.0)).content_hash(),
        _open(Blended(a, 1.0), seed=43).content_hash(),
        _open(Blended(a, 1.0), seq_length=16).content_hash(),
        _open(Blended(a, 1.0), enable_shuffle=True).content_hash(),
        _open(Blended(a, 1.0), data_weights="tokens").content_hash(),
        _open(Blended(a, 1.0), tokenizer=Ids(eod_id=7)).content_hash(),
        _open(Blended(a, 1.0), split="2,1,0").content_hash(),
        _open(Blended(a, 1.0), Blended(other, 1.0)).content_hash(),
    }
    assert len(different | {base}) == 11


@pytest.mark.parametrize(("made_with", "sentence"), [
    ({"eod_id": 5, "fingerprint": "ids"}, "whose eod_id is 5, and this run's is 0"),
    ({"eod_id": EOD, "fingerprint": "other"}, "whose fingerprint is other, and this run's is ids"),
])
def test_data_of_another_tokenizer_is_refused(write_source, made_with, sentence):
    prefix = write_source("a", [50])
    write_manifest(prefix, {"tokenizer": {"type": "SentencePieceTokenizer", "vocab_size": 9, **made_with}})
    with pytest.raises(UserError, match=f"a.json: .*{sentence}"):
        _open(Blended(prefix, None))


def test_data_of_this_tokenizer_is_taken(write_source):
    prefix = write_source("a", [50])
    write_manifest(prefix, {"tokenizer": {"eod_id": EOD, "fingerprint": "ids"}})
    assert _open(Blended(prefix, None)).blend.samples_per_pass == 7


def test_a_token_beyond_the_vocabulary_is_refused_where_it_is_read(write_source):
    prefix = write_source("a", [50])
    _open(Blended(prefix, None), tokenizer=Ids(vocab_size=51)).samples(np.arange(7))
    with pytest.raises(UserError, match="/a: holds token 50, and the tokenizer has 50 ids"):
        _open(Blended(prefix, None), tokenizer=Ids(vocab_size=50)).samples(np.arange(7))


def test_a_source_without_two_tokens_is_refused(write_source):
    with pytest.raises(UserError, match="/a: 1 of its 1 documents .* with 1 tokens; a source needs"):
        _open(Blended(write_source("a", [1]), None))
    with pytest.raises(UserError, match="/b: 0 of its 3 documents are in this part of --split"):
        _open(Blended(write_source("b", [9, 9, 9]), None), split="1000,1,0", part="valid")


@pytest.mark.parametrize(("weights", "data_weights", "sentence"), [
    ([None, 1.0], "relative", "the weight of .*/a is None"),
    ([-1.0, 1.0], "relative", "the weight of .*/a is -1.0; it must be 0 or more"),
    ([0.0, float("nan")], "relative", "the weight of .*/b is nan"),
    ([0.0, 0.0], "relative", "every weight is 0"),
    ([0.5, 100.0], "tokens", "the weight of .*/a is 0.5, and must be a whole number of tokens"),
    ([None, None], "tokens", "--data-path has no weights"),
])
def test_weights_that_make_no_sense_are_refused(write_source, weights, data_weights, sentence):
    prefixes = [write_source("a", [50]), write_source("b", [50])]
    with pytest.raises(UserError, match=sentence):
        _open(*map(Blended, prefixes, weights), data_weights=data_weights)


def test_no_source_at_all_is_refused():
    with pytest.raises(UserError, match="--data-path: names no dataset"):
        _open()


def test_the_length_of_a_mixture_always_fits_its_data(tmp_path):
    """TRAIN_ITERS of random mixtures: as many samples as their weights in tokens allow, or fewer."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        seq_length, batch = int(rng.integers(16, 200)), int(rng.integers(1, 5))
        sources = tuple(
            Source("a", int(rng.integers(2, 40)) * seq_length + int(rng.integers(0, 3)),
                   Fraction(int(rounds), 4))
            for rounds in rng.integers(1, 12, int(rng.integers(1, 5))))
        mixture = Mixture(sources, batch, seq_length, tmp_path, "")
        allowed = sum(
            windows_for_tokens(source.weight_tokens, source.tokens,
                               -(-(source.tokens - 1) // seq_length), seq_length)
            for source in sources)
        assert mixture.train_iters * batch <= allowed
