"""Greedy text of a checkpoint by the training model itself, in fp32: what a converted model must repeat.

    python -m megatron.pretrain.train.greedy --load out/checkpoint --prompt "The"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron.pretrain.checkpoint.manifest import find_checkpoint, read_manifest
from megatron.pretrain.checkpoint.store import load_weights
from megatron.pretrain.config import LayoutConfig, RunConfig, from_dict
from megatron.pretrain.errors import entry
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.tokenizer import build_tokenizer


def main(argv: Sequence[str]) -> int:
    """Print the continuation, or with --json its ids too. Returns the exit code."""
    given = _arguments(argv)
    folder = find_checkpoint(given.load)
    manifest = read_manifest(folder)
    config = on_one_process(from_dict(manifest.config), given.tokenizer_model)
    tokenizer = build_tokenizer(config.tokenizer)
    prompt_ids = tokenizer.encode(given.prompt)
    with placed(config) as place:
        chunks = build_model(config, manifest.config["model"]["padded_vocab_size"], place.device)
        load_weights(folder, chunks)
        new_ids = continue_greedily(chunks[0], prompt_ids, given.max_new_tokens, tokenizer.vocab_size)
    text = tokenizer.decode([*prompt_ids, *new_ids])
    if given.json:
        print(json.dumps({"prompt_ids": prompt_ids, "new_ids": new_ids, "text": text}))
    else:
        print(text)
    return 0


def on_one_process(config: RunConfig, tokenizer_model: str | None) -> RunConfig:
    """The run's configuration for a single process in fp32, wherever the tokenizer's file is now."""
    model = replace(config.model, transformer_impl="local")
    tokenizer = replace(config.tokenizer, tokenizer_model=tokenizer_model or config.tokenizer.tokenizer_model)
    return replace(config, model=model, tokenizer=tokenizer, layout=LayoutConfig(),
                   train=replace(config.train, bf16=False, fp8_format=None, first_last_layers_bf16=False,
                                 enable_cuda_graph=False))


@torch.no_grad()
def continue_greedily(chunk: DistributedDataParallel, prompt_ids: Sequence[int], count: int,
                      vocab_size: int) -> list[int]:
    """The `count` most likely next ids, one after the other; the whole text is read anew for each."""
    chunk.eval()
    ids = list(prompt_ids)
    for _ in range(count):
        tokens = torch.tensor([ids], device=torch.cuda.current_device())
        logits = chunk(tokens, position_ids=None, attention_mask=None)
        ids.append(int(logits[0, -1, :vocab_size].argmax()))
    return ids[len(prompt_ids):]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron.pretrain.train.greedy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="Folder of checkpoints, or one iteration's folder.")
    parser.add_argument("--prompt", required=True, help="Text to continue.")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Tokens to add (default: 64).")
    parser.add_argument("--tokenizer-model", help="Where the tokenizer is now; else where the run had it.")
    parser.add_argument("--json", action="store_true", help="Print ids and text as one JSON object.")
    return parser.parse_args(argv)



if __name__ == "__main__":
    entry(main)
