"""Save small models as a run does, each with what it computes: checkpoints for the tests beside this file.

    python save_models.py OUTPUT TOKENIZER NAME...                                one process
    torchrun --nproc_per_node 4 save_models.py OUTPUT TOKENIZER tp2_pp2           one of a layout's

NAME is a key of MODELS. OUTPUT/NAME/iter_0000100 is the checkpoint, OUTPUT/NAME/expected.pt the logits of
PROMPT and the tokens that follow it greedily. A model with `from` takes that one's weights into its layout,
and is also saved as Megatron-LM formerly did it, to OUTPUT/NAME/former.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.pretrain.config import RunConfig

PROMPT = torch.arange(3, 999, 13)[None, :48]
GREEDY_TOKENS = 64

HEAD_DIM_48 = "--kv-channels 48 --group-query-attention --num-query-groups 2"
MODELS = {
    "mha": "--make-vocab-size-divisible-by 8",    # 1,000 rows: no padding
    "gqa": "--group-query-attention --num-query-groups 2",
    "mqa": "--group-query-attention --num-query-groups 1",
    "head_dim": HEAD_DIM_48,
    "tied": "--group-query-attention --num-query-groups 2 --tied",
    "bf16": f"{HEAD_DIM_48} --bf16",
    "legacy": "--tokenizer-sentencepiece-legacy",
    "deep": f"--num-layers 4 {HEAD_DIM_48}",
    "tp2_pp2": f"{HEAD_DIM_48} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
               "--use-distributed-optimizer --from head_dim",
    "tp4": "--tensor-model-parallel-size 4 --from mha",
    "interleaved": f"--num-layers 4 {HEAD_DIM_48} --tensor-model-parallel-size 2 "
                   "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
                   "--global-batch-size 2 --from deep",
}
SHAPE = ("--hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 --seq-length 128 "
         "--rotary-base 5000 --norm-epsilon 1e-4 --init-method-std 0.15 "
         "--micro-batch-size 1 --train-iters 10 --lr 1e-3 --transformer-impl local --seed 7")


def main() -> None:
    output, tokenizer, *names = sys.argv[1:]
    for name in names:
        save(Path(output), Path(tokenizer), name)


def save(output: Path, tokenizer: Path, name: str) -> None:
    from megatron.pretrain.checkpoint.manifest import Manifest, package_versions
    from megatron.pretrain.checkpoint.store import load_weights, save_checkpoint
    from megatron.pretrain.checks import settle
    from megatron.pretrain.cli import parse
    from megatron.pretrain.layout import placed
    from megatron.pretrain.model.build import build_model
    from megatron.pretrain.optim.optimizer import apply_schedule, build_optimizer, step
    from megatron.pretrain.tokenizer import build_tokenizer
    from megatron.pretrain.train.run import describe_tokenizer, padded_vocabulary
    from megatron.pretrain.train.state import TrainState

    words, _, origin = MODELS[name].partition("--from ")
    flags = [*SHAPE.split(), *words.split(), "--tokenizer-model", str(tokenizer)]
    if "--num-layers" not in flags:
        flags += ["--num-layers", "2"]
    if "--tied" in flags:
        flags.remove("--tied")
    else:
        flags.append("--untie-embeddings-and-output-weights")
    config = settle(parse(flags).config, world_size=4 if origin else 1)
    with placed(config) as place:
        trained = build_tokenizer(config.tokenizer)
        rows = padded_vocabulary(config, trained.vocab_size)
        chunks = build_model(config, rows, place.device)
        optimizer = build_optimizer(config, chunks)
        with torch.no_grad():
            for key, weight in chunks[0].named_parameters():
                if "norm" in key:    # ones would hide a norm that lands in another's place
                    weight.add_(0.1 * torch.randn_like(weight))
        if origin:
            load_weights(output / origin / "iter_0000100", chunks, optimizer)
        apply_schedule(optimizer, 0.0, 0.0)
        step(optimizer, 0.0)    # moves nothing, but gives the optimizer a state to be saved
        described = config.as_dict()
        described["model"]["padded_vocab_size"] = rows
        state = TrainState(iteration=100, consumed_samples=800, consumed_tokens=800 * 128)
        save_checkpoint(output / name, chunks, optimizer, Manifest(
            iteration=100, consumed_samples=800, consumed_tokens=800 * 128, config=described,
            tokenizer=describe_tokenizer(config, trained), mixture_hash="0" * 64,
            train_state=state.as_dict(), versions=package_versions()))
        if origin:
            save_former(output / name / "former", config, rows, chunks)
        if place.world_size == 1:
            torch.save(expected(chunks[0], trained.vocab_size), output / name / "expected.pt")


def save_former(folder: Path, config: RunConfig, rows: int, chunks: list[torch.nn.Module]) -> None:
    """This rank's part in a file of its own, with arguments, as Megatron-LM saved before torch_dist."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    layout, tokenizer = config.layout, config.tokenizer
    args = argparse.Namespace(
        **dataclasses.asdict(config.model), padded_vocab_size=rows, seq_length=config.data.seq_length,
        swiglu=True, normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope",
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size, consumed_train_samples=800,
        tokenizer_type="Llama2Tokenizer", tokenizer_model=tokenizer.tokenizer_model)
    stage = "" if layout.pipeline_model_parallel_size == 1 else (
        f"_{parallel_state.get_pipeline_model_parallel_rank():03d}")
    place = folder / f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}{stage}"
    place.mkdir(parents=True)
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 100,
                **{name: unwrap_model(chunk).state_dict() for name, chunk in zip(names, chunks)}},
               place / "model_optim_rng.pt")


@torch.no_grad()
def expected(model: torch.nn.Module, vocab_size: int) -> dict[str, torch.Tensor]:
    """Logits [prompt, vocabulary] of PROMPT, and the GREEDY_TOKENS ids after it."""
    model.eval()
    ids = PROMPT
    logits = model(ids, position_ids=None, attention_mask=None)[0, :, :vocab_size]
    for _ in range(GREEDY_TOKENS):
        following = model(ids, position_ids=None, attention_mask=None)[0, -1, :vocab_size].argmax()
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return {"logits": logits.float(), "greedy": ids[0, PROMPT.shape[1]:]}


if __name__ == "__main__":
    main()
