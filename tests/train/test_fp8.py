"""Training in fp8 on a CPU: its numbers are those of the GPU's casts, its products are in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.pretrain.export.reader import TorchDistCheckpoint

# The sizes of tests/conftest.py's small model are multiples of 16 in two ranks too.
STEPS, SAVED = 12, 6
LENGTH = ("--train-iters", STEPS, "--bf16", "--transformer-impl", "fused")
FP8 = (*LENGTH, "--fp8")

LAYOUTS = {
    "DP2, distributed optimizer, overlapped, tensorwise": (
        "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--fp8-recipe",
        "tensorwise"),
    "TP2, sequence parallel, MLP recomputed": (
        "--tensor-model-parallel-size", 2, "--sequence-parallel", "--recompute-granularity", "selective",
        "--recompute-modules", "mlp"),
    "PP2, interleaved, recomputed, ends in bf16": (
        "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1,
        "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1,
        "--first-last-layers-bf16"),
}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, train) -> list[float]:
    losses = train(tmp_path_factory.mktemp("bf16"), *LENGTH).losses()
    assert losses[-1] < losses[0] - 0.3, "it must learn, or equal losses would say little"
    return losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, train):
    """A run in fp8 with the delayed recipe, and a checkpoint in its middle."""
    return train(tmp_path_factory.mktemp("fp8"), *FP8, "--save-interval", SAVED)


def test_losses_are_those_of_bf16_within_a_percent(bf16: list[float], straight) -> None:
    assert straight.losses() == pytest.approx(bf16, rel=0.01)
    assert straight.losses() != bf16, "it was not in fp8"


def test_a_checkpoint_has_the_weights_of_any_other(straight) -> None:
    """What a conversion reads of it: no trace of fp8."""
    names = TorchDistCheckpoint(straight.checkpoints / f"iter_{SAVED:07d}").names()
    assert "decoder.layers.3.mlp.linear_fc2.weight" in names and not [name for name in names if "fp8" in name]


def test_a_resumed_run_is_the_straight_one(tmp_path: Path, train, straight) -> None:
    """The scales of the delayed recipe come from the checkpoint's history."""
    resumed = train(tmp_path, *FP8, "--load", straight.checkpoints / f"iter_{SAVED:07d}")
    assert resumed.losses() == straight.losses()[SAVED:]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_agree(layout: tuple, tmp_path: Path, train, straight) -> None:
    losses = train(tmp_path, *FP8, "--load", straight.checkpoints / f"iter_{SAVED:07d}", *layout,
                   processes=2).losses()
    assert losses == pytest.approx(straight.losses()[SAVED:], rel=5e-3)
