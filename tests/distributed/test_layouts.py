"""From one checkpoint, 20 fp32 steps in every layout give the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

START_ITERATIONS, STEPS, TOLERANCE = 2, 20, 1e-5
LENGTH = ("--train-iters", START_ITERATIONS + STEPS)

LAYOUTS = {
    "DP2": (),
    "DP2, overlapped": ("--overlap-grad-reduce",),
    "DP2, distributed optimizer": ("--use-distributed-optimizer",),
    "DP2, distributed optimizer, overlapped": (
        "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    "TP2": ("--tensor-model-parallel-size", 2),
    "TP2, sequence parallel": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", 2),
    "PP2, interleaved, recomputed": (
        "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1,
        "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
}
FUSED = ("--transformer-impl", "fused")
LAYOUTS |= {f"fused, {name}": (*FUSED, *LAYOUTS[name]) for name in (
    "DP2", "DP2, distributed optimizer, overlapped", "TP2", "TP2, sequence parallel", "PP2, interleaved, recomputed")}
LAYOUTS["fused, TP2, sequence parallel, MLP recomputed"] = (
    *FUSED, *LAYOUTS["TP2, sequence parallel"], "--recompute-granularity", "selective", "--recompute-modules", "mlp")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    """A checkpoint of one process, with moments in its optimizer."""
    folder = tmp_path_factory.mktemp("start")
    return train(folder, *LENGTH, "--exit-interval", START_ITERATIONS).checkpoints


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train, start: Path) -> list[float]:
    """The losses of one process."""
    losses = train(tmp_path_factory.mktemp("alone"), *LENGTH, "--load", start).losses()
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3, "it must learn, or equal losses would say little"
    return losses


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_same_losses_as_one_process(layout, tmp_path: Path, train, start: Path, alone: list[float]) -> None:
    losses = train(tmp_path, *LENGTH, "--load", start, *layout, processes=2).losses()
    assert losses == pytest.approx(alone, abs=TOLERANCE)


def test_four_ranks_gather_again_what_two_would_keep(tmp_path: Path, train, start: Path, alone: list[float]) -> None:
    losses = train(tmp_path, *LENGTH, "--load", start, *FUSED, "--tensor-model-parallel-size", 4,
                   "--sequence-parallel", processes=4).losses()
    assert losses == pytest.approx(alone, abs=TOLERANCE)


def test_two_ways_of_four_ranks_overlapped(tmp_path: Path, train, start: Path, alone: list[float]) -> None:
    losses = train(tmp_path, *LENGTH, "--load", start, *FUSED, *LAYOUTS["TP2, sequence parallel"],
                   *LAYOUTS["DP2, distributed optimizer, overlapped"], processes=4).losses()
    assert losses == pytest.approx(alone, abs=TOLERANCE)


def test_tensor_parallel_checkpoint_resumes_in_a_pipeline(tmp_path: Path, train, start: Path,
                                                          alone: list[float]) -> None:
    """Both data-parallel too, so that whole tensors are joined and handed out among two ranks of each part."""
    first = train(tmp_path / "tp", *LENGTH, "--load", start, "--tensor-model-parallel-size", 2,
                  "--use-distributed-optimizer", "--exit-interval", 11, processes=4)
    second = train(tmp_path / "pp", *LENGTH, "--load", first.checkpoints, "--pipeline-model-parallel-size", 2,
                   "--use-distributed-optimizer", processes=4)
    assert len(first.losses()) == 9
    assert first.losses() + second.losses() == pytest.approx(alone, abs=TOLERANCE)
