"""What Megatron-LM's own arguments, kept in each of its checkpoints, say of the model: as a run.json would.

The names are those of Megatron-LM's command line, from 2023 on. A setting that changes what the layers
compute, to something that no table here describes, is refused by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.config import (
    CheckpointConfig, DataConfig, LayoutConfig, LogConfig, ModelConfig, OptimConfig, RunConfig,
    TokenizerConfig, TrainConfig)
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import SENTENCEPIECE_TYPES, TOKENIZER_TYPES, Tokenizer, build_tokenizer

_TOKENIZER = "TOKENIZER_DIR (--tokenizer-dir)"

# Setting, what it is where a version did not know it, and what it must be.
_MUST_BE: tuple[tuple[str, Any, Any], ...] = (
    ("normalization", "LayerNorm", "RMSNorm"),
    ("swiglu", False, True),
    ("add_bias_linear", True, False),
    ("add_qkv_bias", False, False),
    ("apply_layernorm_1p", False, False),
    ("apply_residual_connection_post_layernorm", False, False),
    ("rotary_percent", 1.0, 1.0),
    ("rotary_interleaved", False, False),
    ("use_rope_scaling", False, False),
    ("rotary_seq_len_interpolation_factor", None, None),
    ("num_experts", None, None),
    ("multi_latent_attention", False, False),
    ("window_size", None, None),
)


def manifest_of(args: argparse.Namespace, iteration: int, folder: Path,
                tokenizer_path: Path | None) -> Manifest:
    """A manifest of the checkpoint in `folder`, whose arguments are `args`.

    The tokenizer is the one at `tokenizer_path`, or else where the run had it; its fingerprint is unknown to
    Megatron-LM and therefore this one's. Raises UserError for a model that has no table, or no tokenizer.
    """
    _check_settings(args, folder)
    try:
        config = _config(args, _tokenizer_config(args, folder, tokenizer_path))
        samples = int(getattr(args, "consumed_train_samples", 0) or 0)
        rows = int(args.padded_vocab_size)
        tokens = samples * int(args.seq_length)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise UserError(f"{folder}: its args do not describe a GPT model: {problem}") from None
    trained = build_tokenizer(config.tokenizer)
    if trained.vocab_size > rows:
        raise UserError(f"{_TOKENIZER} {config.tokenizer.tokenizer_model} has {trained.vocab_size:,} ids, "
                        f"the model has {rows:,} rows with its padding: give the tokenizer that it was "
                        "trained with")
    described = config.as_dict()
    described["model"] |= {"padded_vocab_size": rows,
                           "qk_layernorm": bool(getattr(args, "qk_layernorm", False))}
    return Manifest(
        iteration=iteration, consumed_samples=samples, consumed_tokens=tokens, config=described,
        tokenizer=describe_tokenizer(config.tokenizer, trained), mixture_hash="", train_state={}, versions={})


def describe_tokenizer(config: TokenizerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as a manifest remembers it."""
    return {"type": config.tokenizer_type, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id}


def run_config(model: ModelConfig, tokenizer: TokenizerConfig) -> RunConfig:
    """A run of that model of which nothing else is known."""
    return RunConfig(
        model=model, layout=LayoutConfig(), tokenizer=tokenizer,
        data=DataConfig(seq_length=model.max_position_embeddings), optim=OptimConfig(), train=TrainConfig(),
        checkpoint=CheckpointConfig(), log=LogConfig())


def _check_settings(args: argparse.Namespace, folder: Path) -> None:
    for name, unknown, wanted in _MUST_BE:
        said = getattr(args, name, unknown)
        if said != wanted:
            raise UserError(f"{folder} was trained with {name} = {said}; only models with {name} = "
                            f"{wanted} can be converted")
    rotary = getattr(args, "use_rotary_position_embeddings", False)
    kind = "rope" if rotary else getattr(args, "position_embedding_type", "learned_absolute")
    if kind != "rope":
        raise UserError(f"{folder} was trained with position_embedding_type = {kind}; only models with "
                        "rope can be converted")


def _config(args: argparse.Namespace, tokenizer: TokenizerConfig) -> RunConfig:
    heads = int(args.num_attention_heads)
    grouped = bool(getattr(args, "group_query_attention", False))
    epsilon = getattr(args, "norm_epsilon", None) or getattr(args, "layernorm_epsilon", None) or 1e-5
    return run_config(ModelConfig(
        num_layers=int(args.num_layers), hidden_size=int(args.hidden_size),
        ffn_hidden_size=int(args.ffn_hidden_size), num_attention_heads=heads, group_query_attention=grouped,
        num_query_groups=int(args.num_query_groups) if grouped else heads,
        kv_channels=int(getattr(args, "kv_channels", None) or args.hidden_size // heads),
        max_position_embeddings=int(args.max_position_embeddings), norm_epsilon=float(epsilon),
        rotary_base=float(getattr(args, "rotary_base", 10000)),
        untie_embeddings_and_output_weights=bool(getattr(args, "untie_embeddings_and_output_weights", False)),
        init_method_std=float(getattr(args, "init_method_std", 0.02)),
        make_vocab_size_divisible_by=int(getattr(args, "make_vocab_size_divisible_by", 128))), tokenizer)


def _tokenizer_config(args: argparse.Namespace, folder: Path, given: Path | None) -> TokenizerConfig:
    kind, model = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if kind == "NullTokenizer" and given is None:
        # Megatron-LM's ends a document with one id more than --vocab-size.
        return TokenizerConfig(tokenizer_type=kind, vocab_size=int(args.vocab_size) + 1)
    path = given or Path(str(model))
    if not path.exists():
        raise UserError(f"{_TOKENIZER} {given} does not exist" if given else
                        f"{_TOKENIZER} is not given, and {model}, with which {folder} was trained, is not "
                        "here: give it")
    if kind not in TOKENIZER_TYPES or given is not None:
        kind = _type_of(path, kind)
    if kind in SENTENCEPIECE_TYPES and path.is_dir():
        path = sorted(path.glob("*.model"))[0]
    return TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(path),
                           tokenizer_sentencepiece_legacy=_appends_tokens(args, kind))


def _type_of(path: Path, trained: str | None) -> str:
    """The type of a tokenizer that is given, whatever the run called its own."""
    if path.suffix == ".model" or (path.is_dir() and any(path.glob("*.model"))):
        return trained if trained in SENTENCEPIECE_TYPES else "SentencePieceTokenizer"
    return "HuggingFaceTokenizer"


def _appends_tokens(args: argparse.Namespace, kind: str) -> bool:
    """Whether <CLS>, <SEP>, <EOD>, <MASK>, <PAD> came after the pieces: always, before --legacy-tokenizer was
    a choice."""
    return (kind == "SentencePieceTokenizer" == args.tokenizer_type
            and bool(getattr(args, "legacy_tokenizer", True)))
