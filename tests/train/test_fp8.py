"""Training in fp8 on a CPU: its numbers are those of the GPU's casts, its products are in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

# The sizes of tests/conftest.py's small model are multiples of 16 in two ranks too.
STEPS = 20
LENGTH = ("--train-iters", STEPS, "--bf16", "--transformer-impl", "fused")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, train) -> list[float]:
    return train(tmp_path_factory.mktemp("bf16"), *LENGTH).losses()


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_losses_are_those_of_bf16_within_a_percent(recipe: str, bf16: list[float], tmp_path: Path, train) -> None:
    losses = train(tmp_path, *LENGTH, "--fp8", "--fp8-recipe", recipe).losses()
    assert bf16[-1] < bf16[0] - 0.3, "it must learn, or equal losses would say little"
    assert losses == pytest.approx(bf16, rel=0.01)
    assert losses != bf16, "it was not in fp8"


LAYOUTS = {
    "DP2, distributed optimizer, overlapped": (
        "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    "TP2": ("--tensor-model-parallel-size", 2),
    "TP2, sequence parallel, MLP recomputed": (
        "--tensor-model-parallel-size", 2, "--sequence-parallel", "--recompute-activations"),
    "PP2, interleaved, recomputed, ends in bf16": (
        "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1, "--recompute-granularity",
        "full", "--recompute-method", "uniform", "--recompute-num-layers", 1, "--first-last-layers-bf16"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    """A checkpoint of two steps in fp8, whose history the layouts take over."""
    folder = tmp_path_factory.mktemp("start")
    return train(folder, *LENGTH, "--fp8", "--exit-interval", 2).checkpoints


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train, start: Path) -> list[float]:
    return train(tmp_path_factory.mktemp("alone"), *LENGTH, "--fp8", "--load", start).losses()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_agree(layout: tuple, tmp_path: Path, train, start: Path, alone: list[float]) -> None:
    losses = train(tmp_path, *LENGTH, "--fp8", "--load", start, *layout, processes=2).losses()
    assert losses == pytest.approx(alone, rel=0.01)


def test_a_resumed_run_is_the_straight_one(tmp_path: Path, train, start: Path, alone: list[float]) -> None:
    straight = train(tmp_path, *LENGTH, "--fp8", "--exit-interval", 5).losses()
    assert straight[2:5] == alone[:3]
