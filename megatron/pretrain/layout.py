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

from megatron.pretrain.config import LayoutConfig, RunConfig
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

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the log."""
        return self.rank == 0


@contextlib.contextmanager
def placed(config: RunConfig) -> Iterator[Place]:
    """Join the process group, lay out the parallel groups, seed, and leave the group at the end.

    Nothing is torn down after an exception: a rank that failed must end at once, not wait for the others.
    """
    layout = config.layout
    device = _device(layout)
    engine = contextlib.nullcontext() if device.type == "cuda" else engine_on_cpu()
    with engine:
        _join(layout, device)
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, _virtual_stages(config),
            context_parallel_size=layout.context_parallel_size,
            distributed_timeout_minutes=layout.distributed_timeout_minutes)
        # Every pipeline stage has a generator of its own, as in Megatron-LM.
        _seed(config.train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        if config.train.deterministic_mode:
            # cuBLAS is deterministic only with workspaces of a fixed size; torch insists on them.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield Place(
            rank=dist.get_rank(), world_size=dist.get_world_size(), device=device,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


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


def _join(config: LayoutConfig, device: torch.device) -> None:
    if "WORLD_SIZE" not in os.environ:
        # Without torchrun, alone at any port: a MASTER_PORT that the shell holds is where another run meets.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def _virtual_stages(config: RunConfig) -> int | None:
    """Model chunks of each pipeline stage, where the schedule is interleaved."""
    layers = config.layout.num_layers_per_virtual_pipeline_stage
    if layers is None:
        return None
    return config.model.num_layers // config.layout.pipeline_model_parallel_size // layers


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
