"""The order of samples: permutations without a table, and a blend's passes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from megatron.pretrain.data.order import Blend, apportion, permute, windows_for_tokens
from megatron.pretrain.errors import UserError

SIZES = [*range(1, 70), 1000, *(2**k + d for k in (8, 10, 13, 16) for d in (-1, 0, 1)), 999_983]


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, (42, n))), np.arange(n))


@pytest.mark.parametrize("n", [10**9, 10**12, 10**12 + 1, 2**60])
def test_permutation_of_a_large_range_stays_inside_and_repeats_nothing(n):
    positions = np.unique(np.random.default_rng(0).integers(0, n, 20_000))
    values = permute(positions, n, (42,))
    assert 0 <= values.min() and values.max() < n
    assert len(np.unique(values)) == len(positions)


def test_a_position_does_not_depend_on_its_neighbours():
    whole = permute(np.arange(1000), 1000, (7, 1))
    assert permute(np.array([[999, 3], [3, 0]]), 1000, (7, 1)).tolist() == [
        [whole[999], whole[3]], [whole[3], whole[0]]]


def test_keys_choose_different_permutations():
    keys = [(1,), (1, 0), (0, 1), (2,), (11, 1), (1, 11), (-1,), (2**40,)]
    orders = {tuple(permute(np.arange(100), 100, key)) for key in keys}
    assert len(orders) == len(keys)


def test_the_order_of_a_run_never_changes_between_versions():
    assert permute(np.arange(10), 10, (42, 0)).tolist() == [5, 1, 8, 6, 4, 0, 3, 2, 9, 7]
    assert permute(np.arange(3), 10**9, (1234, 2, 5)).tolist() == [908815980, 401704172, 109747636]


def _chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_permutations_look_uniform():
    """A chi-square of c cells has mean c - 1 and deviation sqrt(2c - 2); six deviations are allowed."""
    n, keys = 50, 5000
    orders = np.stack([permute(np.arange(n), n, (key,)) for key in range(keys)])
    cells = {
        "where the first goes": np.bincount(orders[:, 0], minlength=n),
        "where the last goes": np.bincount(orders[:, -1], minlength=n),
        "step between neighbours": np.bincount((orders[:, 1] - orders[:, 0]) % n, minlength=n)[1:],
        "64ths of a large range": np.bincount(permute(np.arange(100_000), 10**9, (3,)) // (10**9 // 64 + 1)),
    }
    for name, counts in cells.items():
        allowed = len(counts) - 1 + 6 * np.sqrt(2 * len(counts) - 2)
        assert _chi_square(counts) < allowed, name


def test_every_order_of_four_is_reached_equally_often():
    orders = [tuple(permute(np.arange(4), 4, (key,))) for key in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert _chi_square(counts) < 23 + 6 * np.sqrt(46)


@pytest.mark.parametrize(("positions", "n"), [([0], 0), ([0], 2**60 + 1), ([5], 5), ([-1], 5)])
def test_permutation_refuses_what_is_out_of_range(positions, n):
    with pytest.raises(ValueError, match="permute"):
        permute(np.array(positions), n, (1,))


@pytest.mark.parametrize(("total", "weights", "counts"), [
    (10, [1, 1], [5, 5]),
    (10, [1, 1, 1], [4, 3, 3]),
    (10, [0.3, 0.7], [3, 7]),
    (100, [30, 70, 0], [30, 70, 0]),
    (7, [0.5, 0.25, 0.25], [3, 2, 2]),
    (4, [1000, 1, 1], [3, 1, 1]),
    (2, [1, 1, 1], [1, 1, 1]),
])
def test_apportionment(total, weights, counts):
    assert apportion(total, weights).tolist() == counts


@pytest.mark.parametrize("rounds", [Fraction(1, 10), Fraction(1), Fraction(3, 2), Fraction(4), Fraction(25)])
@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 16, 17, 1000, 1001])
def test_a_weight_in_tokens_never_exceeds_its_rounds(n_tokens, rounds):
    """At most ceil(rounds x windows), at most one a seq_length of the weight, and short of neither by one."""
    seq_length = 8
    windows = -(-(n_tokens - 1) // seq_length)
    weight = int(n_tokens * rounds)
    given = windows_for_tokens(weight, n_tokens, windows, seq_length)
    assert given <= np.ceil(float(rounds * windows))
    assert given <= weight / seq_length + 1
    assert given >= min(weight / seq_length, weight / n_tokens * windows)


PER_EPOCH = [5, 13, 1, 40]
PER_PASS = [10, 13, 3, 7]


def _first_passes(passes: int, *, seed: int = 42) -> np.ndarray:
    blend = Blend(PER_EPOCH, PER_PASS, seed=seed, repeats=True)
    samples = np.arange(passes * blend.samples_per_pass)
    return np.stack([samples // blend.samples_per_pass, *blend.locate(samples)], axis=1)


def test_every_pass_gives_each_source_its_windows():
    located = _first_passes(3)
    for number in range(3):
        assert np.bincount(located[located[:, 0] == number, 1]).tolist() == PER_PASS


def test_every_epoch_of_a_source_shows_each_window_once():
    located = _first_passes(12)
    for source, (per_epoch, per_pass) in enumerate(zip(PER_EPOCH, PER_PASS, strict=True)):
        epochs, windows = located[located[:, 1] == source, 2:].T
        for epoch in range(12 * per_pass // per_epoch):
            assert np.array_equal(np.sort(windows[epochs == epoch]), np.arange(per_epoch))
        assert epochs.max() <= 12 * per_pass // per_epoch


def test_passes_and_seeds_have_orders_of_their_own():
    first, second = np.split(_first_passes(2)[:, 1:], 2)
    assert not np.array_equal(first[:, 0], second[:, 0])
    assert not np.array_equal(first, _first_passes(1, seed=43)[:, 1:])


def test_samples_may_be_asked_for_in_any_grouping():
    blend = Blend(PER_EPOCH, PER_PASS, seed=42, repeats=True)
    together = np.stack(blend.locate(np.arange(100)))
    alone = np.concatenate([np.stack(blend.locate(np.array([sample]))) for sample in range(100)], axis=1)
    assert np.array_equal(together, alone)
    backwards = np.stack(blend.locate(np.arange(100)[::-1]))
    assert np.array_equal(together[:, ::-1], backwards)


def test_a_far_sample_costs_no_more_than_a_near_one():
    blend = Blend([10**9, 10**8], [10**9, 10**8], seed=1, repeats=True)
    source, epoch, window = blend.locate(np.array([10**14]))
    assert epoch[0] == 10**14 // (11 * 10**8)
    assert 0 <= window[0] < [10**9, 10**8][source[0]]


def test_a_blend_that_does_not_repeat_refuses_what_is_beyond_it():
    blend = Blend(PER_EPOCH, PER_PASS, seed=42, repeats=False)
    assert blend.max_samples == 33
    assert len(blend.locate(np.arange(33))[0]) == 33
    with pytest.raises(UserError, match="holds 33 samples and sample 34 was asked for"):
        blend.locate(np.array([33]))
