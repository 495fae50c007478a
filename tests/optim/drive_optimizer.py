"""Run by test_optimizer.py under torchrun: drives each optimizer, and says what became of its state.

    torchrun --nproc_per_node 2 drive_optimizer.py TENSOR_PARALLEL_SIZE FOLDER torch|triton|by_group

With triton the update is the kernel of a GPU, in Triton's interpreter; with by_group it is an Adam that counts as
apex's and Transformer Engine's do.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if sys.argv[3] == "triton":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
if sys.argv[3] == "by_group":
    from counts_by_group import stand_in

    stand_in()

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.checkpoint.store import load_everything, save_checkpoint
from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.config import RunConfig
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.optim import optimizer as optimizers
from megatron.pretrain.optim.adamw import take_over
from megatron.pretrain.optim.optimizer import apply_schedule, parts, step

LR, WEIGHT_DECAY = 0.125, 0.25
SHAPE = (f"--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --seq-length 8 "
         f"--micro-batch-size 1 --train-iters 9 --lr {LR} --untie-embeddings-and-output-weights")


def build_optimizer(config: RunConfig, chunks: list) -> Any:
    """As a run does, and with triton as on a GPU."""
    optimizer = optimizers.build_optimizer(config, chunks)
    if sys.argv[3] == "triton":
        for part in parts(optimizer):
            take_over(part)
    return optimizer


def main(tensor_parallel_size: str, folder: str, kernel: str) -> None:
    config = settle(parse([*SHAPE.split(), "--tensor-model-parallel-size", tensor_parallel_size]).config,
                    world_size=2)
    facts = {}
    with placed(config) as place:
        for precision in ("fp32", "bf16"):
            for kind in ("plain", "distributed"):
                name = f"{precision} {kind}"
                variant = replace(
                    config, train=replace(config.train, bf16=precision == "bf16"),
                    layout=replace(config.layout, use_distributed_optimizer=kind == "distributed"))
                facts[name] = facts_of(variant, place.device, Path(folder) / name.replace(" ", "_"))
    if place.is_main:
        print("FACTS " + json.dumps(facts))


def facts_of(config: RunConfig, device: torch.device, folder: Path) -> dict[str, Any]:
    chunks = build_model(config, 64, device)
    optimizer = build_optimizer(config, chunks)
    decay = decay_of_a_step_without_gradients(chunks, optimizer)
    skipped = {kind: skip(chunks, optimizer, value) for kind, value in (
        ("inf", math.inf), ("-inf", -math.inf), ("nan", math.nan))}
    moved = update(chunks, optimizer)

    save_checkpoint(folder, chunks, optimizer, manifest_of(config))
    fresh_chunks = build_model(config, 64, device)
    fresh = build_optimizer(config, fresh_chunks)
    load_everything(folder / "iter_0000002", fresh_chunks, fresh, updates=2, with_rng=True)
    loaded = snapshot(fresh_chunks, fresh) == snapshot(chunks, optimizer)
    steps = [state["step"] for state in states(fresh)]
    storages = len({value.data_ptr() for value in steps})
    after_load = sorted({value.item() for value in steps})
    moved_again = [update(chunks, optimizer), update(fresh_chunks, fresh)]
    return everywhere({
        "decay": decay, "skipped": skipped, "moved": moved, "loaded": loaded, "steps": len(steps),
        "storages": storages, "steps_after_load": after_load, "moved_again": moved_again,
        "steps_after_update": sorted({state["step"].item() for state in states(fresh)}),
        "same_after_update": snapshot(fresh_chunks, fresh) == snapshot(chunks, optimizer)})


def decay_of_a_step_without_gradients(chunks: list, optimizer: Any) -> dict[str, list[float]]:
    """By what the elements of matrices, and of norms, were multiplied."""
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    apply_schedule(optimizer, LR, WEIGHT_DECAY)
    step(optimizer, clip_grad=1.0)
    found: dict[str, list[float]] = {"matrices": [], "norms": []}
    for old, new in zip(before, chunks[0].parameters(), strict=True):
        ratio = (new.double() / old.double()).flatten()
        found["norms" if new.dim() == 1 else "matrices"] += [ratio.min().item(), ratio.max().item()]
    return {kind: [min(ratios), max(ratios)] for kind, ratios in found.items()}


def skip(chunks: list, optimizer: Any, value: float) -> dict[str, Any]:
    """What one element that is not finite, in a gradient that rank 1 alone computed, does to a step."""
    before = snapshot(chunks, optimizer)
    fill_gradients(chunks, at_last_rank=value)
    outcome = step(optimizer, clip_grad=1.0)
    return {"updated": outcome.updated, "is_finite": math.isfinite(outcome.grad_norm),
            "untouched": snapshot(chunks, optimizer) == before}


def update(chunks: list, optimizer: Any) -> bool:
    """Whether a step with finite gradients was made and changed every parameter."""
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    apply_schedule(optimizer, LR, WEIGHT_DECAY)
    fill_gradients(chunks)
    updated = step(optimizer, clip_grad=1.0).updated
    return updated and not any(
        torch.equal(old, new) for old, new in zip(before, chunks[0].parameters(), strict=True))


def fill_gradients(chunks: list, at_last_rank: float = 0.0) -> None:
    """Gradients as a backward pass and the engine's reduction leave them, with one value chosen on rank 1."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for number, parameter in enumerate(chunks[0].parameters()):
        # Norms are whole on every tensor-parallel rank, and so are their gradients.
        seed = number + 1000 * tensor_rank * (parameter.dim() > 1)
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    if dist.get_rank() == 1:
        *_, output_layer = chunks[0].parameters()
        output_layer.main_grad[0, 0] = at_last_rank
    chunks[0].finish_grad_sync()


def snapshot(chunks: list, optimizer: Any) -> list[list[float]]:
    """Every number that an update may change."""
    tensors = [parameter.detach() for parameter in chunks[0].parameters()]
    for part in parts(optimizer):
        tensors += [parameter.detach() for group in part.optimizer.param_groups
                    for parameter in group["params"]]
    for state in states(optimizer):
        tensors += [state[name] for name in ("step", "exp_avg", "exp_avg_sq")]
    return [tensor.double().flatten().tolist() for tensor in tensors]


def states(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    """Each parameter's, with the count of its group where the group counts."""
    return [{**{name: torch.tensor(float(group[name])) for name in ("step",) if name in group},
             **part.optimizer.state[parameter]}
            for part in parts(optimizer) for group in part.optimizer.param_groups for parameter in group["params"]]


def manifest_of(config: RunConfig) -> Manifest:
    return Manifest(iteration=2, consumed_samples=0, consumed_tokens=0, config=config.as_dict(), tokenizer={},
                    mixture_hash="", train_state={}, versions={})


def everywhere(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    return gathered


if __name__ == "__main__":
    main(*sys.argv[1:])
