"""Saving and loading a run's state with megatron-core's dist_checkpointing: any layout to any other."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron.pretrain.checkpoint.manifest import (
    TRACKER_NAME, Manifest, file_ends, file_sizes, iteration_name)
from megatron.pretrain.errors import UserError
from megatron.pretrain.model.fused.fp8_model import fp8_states
from megatron.pretrain.optim.sharded import SHARDING, load_tensors, sharded_tensors

logger = logging.getLogger(__name__)

_BOOKKEEPING = "_extra_state"
_WRITER_FAILED = "Worker failure"  # so the engine begins what it says of a file that could not be written


def save_checkpoint(root: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer,
                    manifest: Manifest) -> Path:
    """Save weights, optimizer and random states to `root/iter_NNNNNNN`, and point the tracker there.

    Every rank calls this. The folder has a temporary name until it is whole, so a crash leaves the previous
    checkpoint in place. Returns the folder. Raises UserError if it cannot be written, as on a full disk.
    """
    final = root / iteration_name(manifest.iteration)
    partial = root / f".{final.name}.partial"
    with _writing(partial):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with _parameters_at_rest(chunks):
            content = _model_content(chunks)
            content |= _optimizer_content(optimizer, content, is_loading=False)
            content["rng"] = _sharded_rng()
            content["fp8"] = _sharded_fp8(chunks)
            dist_checkpointing.save(content, str(partial), _save_strategy(), content_metadata=dict(SHARDING))
        if dist.get_rank() == 0:
            dataclasses.replace(
                manifest, file_bytes=file_sizes(partial), file_ends=file_ends(partial)).write(partial)
            _publish(partial, final)
        dist.barrier()
    return final


def load_weights(folder: Path, chunks: list[DistributedDataParallel],
                 optimizer: MegatronOptimizer | None = None) -> None:
    """Load the model's weights alone; an optimizer's master copies follow them."""
    _load_model(folder, chunks, _load(folder, _model_content(chunks)))
    if optimizer is not None:
        optimizer.reload_model_params()


def load_everything(folder: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer,
                    *, updates: int, with_rng: bool) -> None:
    """Load weights, optimizer state and, `with_rng`, the random states, which fit the layout that saved them.

    `updates` is how many optimizer steps the saved state has seen.
    """
    content = _model_content(chunks)
    content |= _optimizer_content(optimizer, content, is_loading=True)
    if with_rng:
        content["rng"] = _sharded_rng()
    content["fp8"] = _saved_fp8(folder, chunks)
    loaded = _load(folder, content)
    _load_model(folder, chunks, loaded)
    _load_fp8(chunks, loaded.get("fp8", {}))  # an empty entry does not come back
    load_tensors(optimizer, loaded.get("optimizer", {}), updates)
    if with_rng:
        _set_rng(loaded["rng"])


def _model_content(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    # The engine's optimizers look for "model" where there is one chunk and "model0", ... where there are more.
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: _weights_alone(unwrap_model(chunk).sharded_state_dict())
            for name, chunk in zip(names, chunks, strict=True)}


def _optimizer_content(optimizer: MegatronOptimizer, content: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Without an entry where this rank has nothing to save or load: an empty one would not come back."""
    tensors = sharded_tensors(optimizer, _of_model(content), is_loading=is_loading)
    return {"optimizer": tensors} if tensors else {}


def _weights_alone(content: dict[str, Any]) -> dict[str, Any]:
    """Without the entries in which Transformer Engine's layers keep fp8 bookkeeping: others lack them, and a
    checkpoint must load whatever layers a run is built from."""
    return {name: tensor for name, tensor in content.items() if not name.endswith(_BOOKKEEPING)}


def _of_model(content: dict[str, Any]) -> dict[str, Any]:
    """The model's part of a sharded state dict."""
    return {name: part for name, part in content.items() if name.startswith("model")}


@contextmanager
def _parameters_at_rest(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """With --overlap-param-gather the forward pass gathers what the last step updated: gather it now."""
    overlapping = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of a checkpoint that cannot be written what was wrong, and leave no part of it."""
    try:
        yield
    except OSError as error:
        reason, cause = error.strerror or str(error), error
    except CheckpointException as error:
        reason, cause = str(_first_failure(error)), error
        if _WRITER_FAILED not in reason:
            raise
    else:
        return
    existing = next(path for path in folder.parents if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        f"{folder}: this checkpoint cannot be written: {reason}; with what was written of it, {free_gib:,.1f} GiB were "
        "free there. What was saved before it is whole, and the next start goes on from there") from cause


def _save_strategy() -> Any:
    # The engine asks a process of its own, which takes seconds to start, to carry the writers' results over to
    # another process. Here they are read where they are put.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
    return FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True))


def _publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, then let the tracker name it, in steps that each are atomic."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    tracker = final.parent / TRACKER_NAME
    beside = tracker.with_name(f".{TRACKER_NAME}.partial")
    beside.write_text(f"{int(final.name.removeprefix('iter_'))}\n", encoding="utf-8")
    os.replace(beside, tracker)


def _load(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(content, str(folder))
    except CheckpointException as error:
        raise UserError(f"{folder}: cannot be loaded, its files are damaged: {_first_failure(error)!r}") from error
    except (CheckpointingException, OSError) as error:
        raise UserError(f"{folder}: cannot be loaded: {error}") from error


def _first_failure(error: CheckpointException) -> BaseException:
    """One rank's failure, of an error that is no Exception and whose text is the tracebacks of all ranks."""
    failure, _ = next(iter(error.failures.values()))
    return failure


def _load_model(folder: Path, chunks: list[DistributedDataParallel], loaded: dict[str, Any]) -> None:
    for chunk, part in zip(chunks, _of_model(loaded).values(), strict=True):
        missing, unexpected = unwrap_model(chunk).load_state_dict(part, strict=False)
        wrong = [name for name in (*missing, *unexpected) if not name.endswith(_BOOKKEEPING)]
        if wrong:
            raise UserError(f"{folder}: tensors missing or unknown: {', '.join(wrong[:5])}")


def _sharded_fp8(chunks: list[DistributedDataParallel]) -> dict[str, ShardedTensor]:
    """The history of the layers' largest values, from which --fp8-recipe delayed takes its scales.

    All ranks that hold a layer have the same; a layer is saved by its number, for any layout to load.
    """
    replica = (0, parallel_state.get_tensor_model_parallel_rank(),
               parallel_state.get_data_parallel_rank(with_context_parallel=True))
    names = {f"fp8.history.{layer}": part for state in fp8_states(chunks)
             for layer, part in state.layer_histories().items()}
    return {name: ShardedTensor.from_rank_offsets(name, part, replica_id=replica)
            for name, part in names.items()}


def _saved_fp8(folder: Path, chunks: list[DistributedDataParallel]) -> dict[str, ShardedTensor]:
    """The histories of all layers of this rank that are in fp8, or none if the checkpoint lacks any."""
    wanted = _sharded_fp8(chunks)
    if wanted and not wanted.keys() <= dist_checkpointing.load_tensors_metadata(str(folder)).keys():
        logger.info("the checkpoint has no history for --fp8-recipe delayed: it begins with this run")
        return {}
    return wanted


def _load_fp8(chunks: list[DistributedDataParallel], loaded: dict[str, torch.Tensor]) -> None:
    for state in fp8_states(chunks) if loaded else ():
        for layer, part in state.layer_histories().items():
            part.copy_(loaded[f"fp8.history.{layer}"])
        state.resume()


def _sharded_rng() -> ShardedObject:
    """The random states of this rank, which its data-parallel peers share."""
    return ShardedObject(
        "rng_state", _get_rng(),
        (parallel_state.get_pipeline_model_parallel_world_size(),
         parallel_state.get_tensor_model_parallel_world_size()),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _get_rng() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
              "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    # The generators of a CPU and of a GPU have no states in common.
    if torch.cuda.is_available() == ("cuda" in states):
        get_cuda_rng_tracker().set_states(states["tracker"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
