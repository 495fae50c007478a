"""Write a small checkpoint with random weights by torch alone, in the time that importing torch takes.

    python write_checkpoint.py [--numbered] OUTPUT TOKENIZER ITERATION...

makes OUTPUT/iter_NNNNNNN for each iteration, of 8 samples of 128 tokens. With --numbered each layer's tensors
have names of their own; without, they are stacked over the layers, as megatron-core stacks them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megatron.pretrain.checkpoint.manifest import Manifest, file_ends, file_sizes, iteration_name
from megatron.pretrain.cli import parse
from megatron.pretrain.tokenizer import build_tokenizer

FLAGS = ("--num-layers 2 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 "
         "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights "
         "--seq-length 128 --micro-batch-size 1 --global-batch-size 8 --train-iters 1000 --lr 1e-3")
TOKENS_AN_ITERATION = 8 * 128

LAYER_SHAPES = {
    "input_layernorm.weight": (64,),
    "self_attention.linear_qkv.weight": (128, 64),
    "self_attention.linear_proj.weight": (64, 64),
    "pre_mlp_layernorm.weight": (64,),
    "mlp.linear_fc1.weight": (320, 64),
    "mlp.linear_fc2.weight": (64, 160),
}


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--numbered"]
    output, tokenizer = words[:2]
    for iteration in words[2:]:
        write(Path(output), tokenizer, int(iteration), numbered="--numbered" in sys.argv)


def write(output: Path, tokenizer: str, iteration: int, *, numbered: bool) -> None:
    config = parse([*FLAGS.split(), "--tokenizer-model", tokenizer]).config
    trained = build_tokenizer(config.tokenizer)
    folder = output / iteration_name(iteration)
    dcp.save(tensors(iteration, rows=1024, numbered=numbered),
             storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False), no_dist=True)
    tokens = iteration * TOKENS_AN_ITERATION
    manifest = Manifest(
        iteration=iteration, consumed_samples=iteration * 8, consumed_tokens=tokens, config=config.as_dict(),
        tokenizer={"type": "SentencePieceTokenizer", "fingerprint": trained.fingerprint,
                   "vocab_size": trained.vocab_size, "eod_id": trained.eod_id, "bos_id": trained.bos_id,
                   "eos_id": trained.eos_id},
        mixture_hash="0" * 64, train_state={}, versions={}, file_bytes=file_sizes(folder),
        file_ends=file_ends(folder))
    manifest.write(folder)


def tensors(seed: int, rows: int, *, numbered: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    content = {"embedding.word_embeddings.weight": random(rows, 64),
               "decoder.final_layernorm.weight": random(64),
               "output_layer.weight": random(rows, 64),
               "optimizer.state.exp_avg.output_layer.weight": random(rows, 64)}
    for name, shape in LAYER_SHAPES.items():
        stacked = random(2, *shape)
        if numbered:
            content |= {f"decoder.layers.{layer}.{name}": stacked[layer].clone() for layer in range(2)}
        else:
            content[f"decoder.layers.{name}"] = stacked
    return content


if __name__ == "__main__":
    main()
