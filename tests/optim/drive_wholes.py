"""Run by test_wholes.py under torchrun: every weight's state is joined at its owner, and handed out again.

    torchrun --nproc_per_node RANKS drive_wholes.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.checkpoint.store import load_everything, save_checkpoint
from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.config import RunConfig
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.optim import wholes as wholes_module
from megatron.pretrain.optim.optimizer import build_optimizer, parts, step
from megatron.pretrain.optim.wholes import Whole, gather, scatter, wholes

SHAPE = ("--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --seq-length 8 --bf16 "
         "--micro-batch-size 1 --train-iters 9 --lr 0.1 --use-distributed-optimizer "
         "--untie-embeddings-and-output-weights").split()
NAMES = ("param", "exp_avg", "exp_avg_sq")


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    config = settle(parse([*SHAPE, "--global-batch-size", str(ranks)]).config, world_size=ranks)
    with placed(config) as place:
        chunks = build_model(config, 64, place.device)
        optimizer = build_optimizer(config, chunks)
        for parameter in chunks[0].parameters():
            parameter.main_grad.fill_(1.0)
        step(optimizer, clip_grad=1.0)
        (part,) = parts(optimizer)
        facts = facts_of(part, wholes(part, NAMES))
        facts["saved_by_one"] = saved_by_one(config, chunks, optimizer, Path(sys.argv[1]))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, facts)
        if place.is_main:
            print("FACTS " + json.dumps(gathered))


def facts_of(part: Any, everything: list[Whole]) -> dict[str, Any]:
    rank = part.data_parallel_group.rank()
    joined = handed_out = True
    for number, whole in enumerate(everything):
        own = whole.piece_of(rank)
        meant = torch.arange(whole.weight.numel()) * -1.0 - 1e4 * number * (number > 0)    # with a -0
        if own is not None:
            part._get_main_param_and_optimizer_states(whole.weight)[whole.name].data.copy_(meant[own.place])
        found = gather(part, whole)
        joined &= (found is not None) == (whole.owner == rank)
        joined &= found is None or torch.equal(found.view(torch.int32), meant.view(torch.int32))
        piece = scatter(part, whole, None if found is None else -found.view(whole.weight.shape))
        handed_out &= (piece is None) == (own is None)
        handed_out &= own is None or torch.equal(piece, -meant[own.place])
    sizes = [whole.weight.numel() for whole in everything]
    return {"joined": joined, "handed_out": handed_out,
            "owned": sum(size for size, whole in zip(sizes, everything, strict=True) if whole.owner == rank),
            "at_its_owner": sum(whole.is_at_its_owner for whole in everything),
            "cut": sum(len(whole.pieces) > 1 for whole in everything),
            "owned_without_a_piece": sum(whole.piece_of(whole.owner) is None for whole in everything),
            "largest": max(sizes), "all": sum(sizes)}


def saved_by_one(config: RunConfig, chunks: list, optimizer: Any, folder: Path) -> bool:
    """Whether a state comes back whole where ranks own nothing, as if there were more of them than tensors."""
    wholes_module.shared_out = lambda sizes, ranks: [0] * len(sizes)
    (part,) = parts(optimizer)
    held = [part._get_main_param_and_optimizer_states(weight)[name]
            for weight in part.model_param_gbuf_map for name in NAMES]
    meant = [values.detach().clone() for values in held]
    manifest = Manifest(iteration=1, consumed_samples=0, consumed_tokens=0, config=config.as_dict(), tokenizer={},
                        mixture_hash="", train_state={}, versions={})
    saved = save_checkpoint(folder, chunks, optimizer, manifest)
    for values in held:
        values.data.fill_(7.0)
    load_everything(saved, chunks, optimizer, updates=1, with_rng=True)
    return all(torch.equal(part._get_main_param_and_optimizer_states(weight)[name], meant[place])
               for place, (weight, name) in enumerate(
                   (weight, name) for weight in part.model_param_gbuf_map for name in NAMES))


if __name__ == "__main__":
    main()
