"""From torchrun's environment to process groups, a device and seeds."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron.pretrain.config import LayoutConfig
from megatron.pretrain.device import engine_on_cpu
from megatron.pretrain.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where this process stands in the run."""

    rank: int
    world_size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    @property
    def is_reporter(self) -> bool:
        """Whether this is the last rank, which holds the loss and writes the log (as Megatron-LM's does)."""
        return self.rank == self.world_size - 1


def world_size_of_environment() -> int:
    """Processes that torchrun started; 1 without it. Raises UserError for a malformed WORLD_SIZE."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"WORLD_SIZE={value!r} in the environment: must be the number of processes")
    return int(value)


@contextlib.contextmanager
def placed(config: LayoutConfig, *, seed: int, deterministic: bool = False) -> Iterator[Place]:
    """Join the process group, lay out the parallel groups, seed, and leave the group at the end.

    `seed` gives every pipeline stage a generator of its own, as Megatron-LM does.
    """
    device = _device(config)
    engine = contextlib.nullcontext() if device.type == "cuda" else engine_on_cpu()
    with engine, _process_group(config, device):
        parallel_state.initialize_model_parallel(
            config.tensor_model_parallel_size, config.pipeline_model_parallel_size,
            _virtual_stages(config), context_parallel_size=config.context_parallel_size,
            distributed_timeout_minutes=config.distributed_timeout_minutes)
        _seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        if deterministic:
            torch.use_deterministic_algorithms(True)
        try:
            yield Place(
                rank=dist.get_rank(), world_size=dist.get_world_size(), device=device,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
                is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True))
        finally:
            parallel_state.destroy_model_parallel()


def _device(config: LayoutConfig) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if config.distributed_backend == "nccl" and not has_cuda:
        raise UserError("--distributed-backend nccl needs CUDA, which this machine lacks; use gloo or auto")
    if config.distributed_backend == "gloo" and has_cuda:
        raise UserError("--distributed-backend gloo is for machines without CUDA; here use nccl or auto")
    if not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                        "start one process a GPU (--nproc_per_node)")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def _process_group(config: LayoutConfig, device: torch.device) -> Iterator[None]:
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, alone)
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _virtual_stages(config: LayoutConfig) -> int | None:
    # The engine only asks whether the pipeline is interleaved here; layers are counted by the model room.
    return None if config.num_layers_per_virtual_pipeline_stage is None else 2


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
