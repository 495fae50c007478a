"""A mixture of 2,000 sources and 10^9 samples: set up without a loop, found at any place at once."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.dataset import open_dataset
from megatron.pretrain.data.blend import Blended
from megatron.pretrain.data.order import Blend
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer

SOURCES, SAMPLES = 2_000, 1_000_000_000
PROCESSOR_S = 10.0
"""A loop over 10^9 samples takes minutes; this takes a second, and the machine may be a slow one."""


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tiny_tokenizer)))


@pytest.fixture
def prefixes(tiny_dataset: Path, tmp_path: Path) -> list[str]:
    for number in range(SOURCES):
        for ending in (".bin", ".idx", ".json"):
            (tmp_path / f"source{number}{ending}").symlink_to(f"{tiny_dataset}{ending}")
    return [str(tmp_path / f"source{number}") for number in range(SOURCES)]


@pytest.mark.parametrize("enable_shuffle", [False, True])
def test_two_thousand_sources_are_opened_and_read_anywhere(enable_shuffle: bool, prefixes: list[str],
                                                           tokenizer: Tokenizer):
    started = time.process_time()
    dataset = open_dataset([Blended(prefix, 1.0 + number) for number, prefix in enumerate(prefixes)],
                           tokenizer=tokenizer, seq_length=32, seed=42, enable_shuffle=enable_shuffle)
    last, _ = dataset.samples(np.array([0, SAMPLES - 1]))
    assert time.process_time() - started < PROCESSOR_S
    assert last.shape == (2, 33)
    again, _ = dataset.samples(np.array([SAMPLES - 1]))
    assert (again[0] == last[1]).all()


def test_a_billion_samples_are_blended_and_each_is_one_window():
    windows = np.random.default_rng(1).integers(1, 2 * SAMPLES // SOURCES, SOURCES)
    started = time.process_time()
    blend = Blend(windows, windows, seed=42, repeats=False)
    first = blend.locate(np.arange(100_000))
    last = blend.locate(np.arange(blend.samples_per_pass - 100_000, blend.samples_per_pass))
    assert time.process_time() - started < PROCESSOR_S
    assert 0.9 * SAMPLES < blend.max_samples < 1.1 * SAMPLES
    places = np.concatenate([np.stack(first, axis=1), np.stack(last, axis=1)])
    assert len(np.unique(places, axis=0)) == 200_000 and (places[:, 2] < windows[places[:, 0]]).all()
    # So many samples are of each source as its share says, within what chance allows.
    share = np.bincount(places[:, 0], minlength=SOURCES) / 200_000
    assert np.abs(share - windows / windows.sum()).max() < 5e-4


def test_a_truncated_one_of_two_thousand_is_named_before_training(prefixes: list[str], tokenizer: Tokenizer):
    damaged = Path(f"{prefixes[1234]}.bin")
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-2])
    with pytest.raises(UserError, match="source1234.bin: is .* bytes long where its .idx asks for"):
        open_dataset([Blended(prefix, 1.0) for prefix in prefixes], tokenizer=tokenizer, seq_length=32,
                     seed=42)
