"""Run by test_linear.py: the hooks in which the engine waits for a module's weights, of a model of fused layers.

    python drive_hooks.py [FLAGS]
"""

from __future__ import annotations

import sys

import torch
from megatron.core.utils import unwrap_model

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model

SHAPE = ("--num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 "
         "--micro-batch-size 1 --train-iters 1 --lr 0.1 --transformer-impl fused --bf16 "
         "--untie-embeddings-and-output-weights").split()


def main(flags: list[str]) -> None:
    config = settle(parse([*SHAPE, *flags]).config, world_size=1)
    with placed(config) as place:
        [chunk] = build_model(config, 64, place.device)
        model = unwrap_model(chunk)
        weighted = {name: module for name, module in model.named_modules()
                    if module._parameters.get("weight") is not None}
        waited: list[str] = []
        for name, module in weighted.items():
            def hook(*_: object, name: str = name) -> None:
                waited.append(name)
                weighted[name].weight.data.fill_(0.01)

            module.register_forward_pre_hook(hook)
            module.weight.data.fill_(torch.nan)    # as it is before it is gathered
        tokens = torch.arange(16)[None]
        losses = model(tokens, position_ids=None, attention_mask=None, labels=tokens)
        assert losses.isfinite().all(), "a weight was used before it was waited for"
        missing = sorted(weighted.keys() - set(waited))
        assert not missing, missing
        print(f"waited for {len(weighted)} weights")


if __name__ == "__main__":
    main(sys.argv[1:])
