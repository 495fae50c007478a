"""Save small models as Megatron-LM does today: torch_dist, its arguments in common.pt, no run.json.

    python save_megatron_lm.py OUTPUT TOKENIZER NAME...

NAME is `plain`, or `qk_norm` for norms of query and key, which this project's trainer does not build: the
engine's own layers do. OUTPUT/NAME/iter_0000100 is the checkpoint, OUTPUT/NAME/expected.pt the logits of
PROMPT and the tokens that follow it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

FLAGS = ("--num-layers 2 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 --seq-length 128 "
         "--group-query-attention --num-query-groups 2 --kv-channels 48 "
         "--untie-embeddings-and-output-weights --rotary-base 5000 --norm-epsilon 1e-4 "
         "--init-method-std 0.15 --micro-batch-size 1 --train-iters 10 --lr 1e-3 "
         "--transformer-impl local --seed 7")


def main() -> None:
    output, tokenizer, *names = sys.argv[1:]
    for name in names:
        save(Path(output) / name, tokenizer, qk_norm=name == "qk_norm")


def save(output: Path, tokenizer: str, *, qk_norm: bool) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.enums import ModelType

    from megatron.pretrain.checks import settle
    from megatron.pretrain.cli import parse
    from megatron.pretrain.layout import placed

    config = settle(parse([*FLAGS.split(), "--tokenizer-model", tokenizer]).config, world_size=1)
    with placed(config) as place:
        model = build(config, qk_norm, place.device)
        args = argparse.Namespace(
            **dataclasses.asdict(config.model), qk_layernorm=qk_norm, padded_vocab_size=1024, seq_length=128,
            swiglu=True, normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope",
            tensor_model_parallel_size=1, pipeline_model_parallel_size=1, consumed_train_samples=800,
            tokenizer_type="Llama2Tokenizer", tokenizer_model=tokenizer, params_dtype=torch.float32,
            model_type=ModelType.encoder_or_decoder)
        folder = output / "iter_0000100"
        folder.mkdir(parents=True)
        dist_checkpointing.save(
            {"model": model.sharded_state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": 100,
             "optimizer": {"param_groups": [{"lr": 1e-4}]}}, str(folder))
        torch.save(of_save_models().expected(model, 1000), output / "expected.pt")


def build(config: object, qk_norm: bool, device: torch.device) -> torch.nn.Module:
    """The engine's GPT model, with the norms of our local layers, which run without apex."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron.pretrain.model.build import transformer_config
    from megatron.pretrain.model.layers import RMSNorm

    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = GPTModel(
        dataclasses.replace(transformer_config(config, device), qk_layernorm=qk_norm),
        TransformerBlockSubmodules(layer_specs=[layer] * config.model.num_layers, layer_norm=RMSNorm),
        vocab_size=1024, max_sequence_length=128, share_embeddings_and_output_weights=False,
        position_embedding_type="rope", rotary_base=config.model.rotary_base)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:    # ones would hide a norm that lands in another's place
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def of_save_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("save_models", Path(__file__).with_name("save_models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
