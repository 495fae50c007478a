"""Micro-batches as CUDA graphs: what may be recorded, the arithmetic around it, and on a GPU the same losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import random as engine_random
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.errors import UserError
from megatron.pretrain.train.greedy import on_one_process
from megatron.pretrain.train.recording import random_states_stay

SHAPE = ("--num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 "
         "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --enable-cuda-graph").split()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ON_TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SHARDED = ("--tensor-model-parallel-size", "2", "--sequence-parallel")


@pytest.mark.parametrize("flags, sentence", [
    ("--transformer-impl local", "--transformer-impl local is not recorded here; use fused"),
    ("--pipeline-model-parallel-size 2", "a pipeline's micro-batches are not recorded"),
    ("--overlap-grad-reduce", "what hooks start and wait for with --overlap-grad-reduce is not recorded"),
    ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
     "with --overlap-grad-reduce and --overlap-param-gather is not recorded"),
    ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
     "--recompute-granularity full is not recorded")])
def test_what_cannot_be_recorded_is_refused(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"--enable-cuda-graph: .*{sentence}"):
        settle(parse([*SHAPE, *flags.split()]).config, world_size=2)


def test_a_model_that_was_recorded_speaks_without() -> None:
    flags = ["--transformer-impl", "fused", "--bf16", "--fp8", "--first-last-layers-bf16"]
    train = settle(parse([*SHAPE, *flags]).config, world_size=1).train
    alone = on_one_process(settle(parse([*SHAPE, *flags]).config, world_size=1), None).train
    assert train.enable_cuda_graph and not alone.enable_cuda_graph
    assert train.fp8_format == "hybrid" and alone.fp8_format is None and not alone.first_last_layers_bf16


def test_random_states_stay_while_something_is_recorded() -> None:
    tracker = CudaRNGStatesTracker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_random, "_CUDA_RNG_STATE_TRACKER", tracker)
        patch.setattr(engine_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
        with random_states_stay(), tracker.fork():    # of no state that there is
            torch.rand(1)
    with pytest.raises(Exception, match="is not added"), tracker.fork():
        torch.rand(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path, train) -> None:
    said = train(tmp_path, "--train-iters", 9, "--transformer-impl", "fused", "--enable-cuda-graph",
                 expect_failure=True)
    assert "--enable-cuda-graph needs CUDA, which this machine lacks; leave it out" in said.output


@pytest.mark.parametrize("flags", [(), ("--calculate-per-token-loss",)], ids=["mean of means", "per token"])
def test_one_by_one_is_the_schedule(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The way around the graphs, without graphs: two ranks, three micro-batches, the same gradients."""
    driver = Path(__file__).with_name("drive_one_by_one.py")
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          str(driver), *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "gradients: equal, losses: equal" in ran.stdout


@pytest.mark.parametrize("flags", [
    pytest.param((), marks=ON_GPU), pytest.param(("--fp8",), marks=ON_GPU),
    pytest.param(("--calculate-per-token-loss",), marks=ON_GPU),
    pytest.param(SHARDED, marks=ON_TWO_GPUS), pytest.param((*SHARDED, "--fp8"), marks=ON_TWO_GPUS)])
def test_recorded_losses_are_the_others(tmp_path: Path, train, flags: tuple[str, ...]) -> None:
    length = ("--train-iters", 12, "--bf16", "--transformer-impl", "fused", *flags)
    eager, recorded = (train(tmp_path / name, *length, *more, processes=2 if flags[:2] == SHARDED[:2] else 1)
                       for name, more in (("eager", ()), ("graph", ("--enable-cuda-graph",))))
    assert recorded.losses() == pytest.approx(eager.losses(), rel=2e-3)
    assert "recorded a step's later micro-batches as a CUDA graph" in recorded.output
