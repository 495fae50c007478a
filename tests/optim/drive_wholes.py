"""Run by test_wholes.py under torchrun: every weight's state is joined at its owner, and handed out again.

    torchrun --nproc_per_node RANKS drive_wholes.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
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
        facts = facts_of(part, wholes(part))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, facts)
        if place.is_main:
            print("FACTS " + json.dumps(gathered))


def facts_of(part: Any, everything: list[Whole]) -> dict[str, Any]:
    rank = part.data_parallel_group.rank()
    owned, joined, handed_out = 0, True, True
    for number, whole in enumerate(everything):
        own = whole.piece_of(rank)
        for place, name in enumerate(NAMES):
            meant = torch.arange(whole.weight.numel()) + 1e5 * number + 1e4 * place
            held = None if own is None else part._get_main_param_and_optimizer_states(whole.weight)[name]
            if own is not None:
                held.data.copy_(meant[own.start:own.end])
            found = gather(part, whole, name)
            joined &= (found is not None) == (whole.owner == rank)
            joined &= found is None or torch.equal(found, meant)
            piece = scatter(part, whole, None if found is None else -found.view(whole.weight.shape))
            handed_out &= (piece is None) == (own is None)
            handed_out &= own is None or torch.equal(piece, -meant[own.start:own.end])
        owned += whole.weight.numel() * (whole.owner == rank)
    return {"joined": joined, "handed_out": handed_out, "owned": owned,
            "whole": sum(len(whole.pieces) == 1 for whole in everything),
            "cut": sum(len(whole.pieces) > 1 for whole in everything),
            "owned_without_a_piece": sum(whole.piece_of(whole.owner) is None for whole in everything),
            "largest": max(whole.weight.numel() for whole in everything),
            "all": sum(whole.weight.numel() for whole in everything)}


if __name__ == "__main__":
    main()
