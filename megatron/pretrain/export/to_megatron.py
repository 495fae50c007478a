"""One Hugging Face folder to one checkpoint that `pretrain_*.sh --finetune` starts from, in any layout."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.pretrain.checkpoint.manifest import (
    TRACKER_NAME, Manifest, file_ends, file_sizes, iteration_name, package_versions)
from megatron.pretrain.config import ModelConfig, TokenizerConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.export import EXPORT_FILE
from megatron.pretrain.export.copying import Rows
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.hf_config import CONFIG_FILE, read_config
from megatron.pretrain.export.hf_reader import HfFolder
from megatron.pretrain.export.megatron_args import describe_tokenizer, run_config
from megatron.pretrain.export.names import Architecture, Rule
from megatron.pretrain.export.padding import MeanRow
from megatron.pretrain.export.reader import TorchDistCheckpoint
from megatron.pretrain.export.shape import ModelShape
from megatron.pretrain.export.torch_dist_writer import WeightSpec, write_torch_dist
from megatron.pretrain.model.flops import padded_vocab_size
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer

# Megatron-LM takes no checkpoint of iteration 0.
ITERATION = 1

# Rows for tensor-parallel 8: a run with fewer ranks leaves out what it does not need.
_ROWS_MULTIPLE = 128 * 8


@dataclass(frozen=True)
class ImportOptions:
    """What a user may choose. None: as the folder has it."""

    tokenizer_path: Path | None = None
    tokenizer_type: str | None = None
    tokenizer_legacy: bool = False
    dtype: ElementType | None = None
    for_megatron_lm: bool = False


@dataclass(frozen=True)
class ImportPlan:
    """A conversion that has been checked as far as it can be without reading the weights."""

    source: HfFolder
    architecture: Architecture
    shape: ModelShape
    rules: tuple[Rule, ...]
    tokenizer_config: TokenizerConfig
    tokenizer: Tokenizer
    dtype: ElementType | None
    for_megatron_lm: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights to be written."""
        return sum(math.prod(spec.shape) * spec.dtype.size_bytes for spec in map(self.spec, self.rules))

    def spec(self, rule: Rule) -> WeightSpec:
        """The rule's tensor as it is to be written, and of which rows."""
        sources = [self.source.tensor(name) for name in rule.hf]
        length = sum(source.shape[0] for source in sources)
        rows = [Rows(sources[part.tensor], part.start, part.stop) for part in rule.rows(length, self.shape)]
        if rule.megatron_shape(self.shape)[0] is None and length < self.shape.padded_vocab_size:
            rows.append(Rows(MeanRow(sources[0]), 0, self.shape.padded_vocab_size - length))
            length = self.shape.padded_vocab_size
        return WeightSpec(rule.megatron[-1], (length, *sources[0].shape[1:]), self.dtype or sources[0].dtype,
                          tuple(rows))


def plan_import(folder: Path, options: ImportOptions) -> ImportPlan:
    """Check the folder against its config.json and the tokenizer; reads no weights.

    Raises UserError naming what is missing, damaged or contradictory.
    """
    architecture, shape = read_config(folder)
    if not (architecture.trainable or options.for_megatron_lm):
        raise UserError(f"{folder / CONFIG_FILE} describes a {architecture.name}, whose layers this "
                        "project does not train (norms of query and key); --for-megatron-lm writes a "
                        "checkpoint for Megatron-LM")
    source = HfFolder(folder)
    tokenizer_config = _find_tokenizer(folder, options)
    tokenizer = build_tokenizer(tokenizer_config)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"--tokenizer-model {tokenizer_config.tokenizer_model} has "
                        f"{tokenizer.vocab_size:,} ids, the model {shape.vocab_size:,} rows: give the "
                        "tokenizer that it was trained with")
    shape = dataclasses.replace(shape, padded_vocab_size=padded_vocab_size(shape.vocab_size, _ROWS_MULTIPLE))
    rules = tuple(architecture.rules(shape))
    _check_tensors(source, rules, shape)
    return ImportPlan(source, architecture, shape, rules, tokenizer_config, tokenizer, options.dtype,
                      options.for_megatron_lm)


def run_import(plan: ImportPlan, target: Path, *, verify: bool = False,
               on_bytes: Callable[[int], None] = lambda size_bytes: None) -> Path:
    """Write `target`, which must not exist, whole or not at all: one iteration and the file that names it.

    `on_bytes` hears of each tensor written. `verify` reads each back and compares it with the folder's, bit
    by bit. Returns the iteration's folder.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    folder = partial / iteration_name(ITERATION)
    try:
        folder.mkdir(parents=True)
        tensors = [plan.spec(rule) for rule in plan.rules]
        for size_bytes in write_torch_dist(folder, plan.shape.num_layers, tensors, _common(plan)):
            on_bytes(size_bytes)
        if verify:
            _check_written(plan, TorchDistCheckpoint(folder))
        if not plan.for_megatron_lm:
            _manifest(plan, folder).write(folder)
        (partial / TRACKER_NAME).write_text(f"{ITERATION}\n", encoding="utf-8")
        partial.rename(target)
    except OSError as problem:
        raise UserError(f"{target} could not be written: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / folder.name


def _check_tensors(source: HfFolder, rules: tuple[Rule, ...], shape: ModelShape) -> None:
    """Every tensor that the table wants must be there in its shape, and none may be left over."""
    left_over = dict.fromkeys(source.names())
    if shape.tied_embeddings:
        left_over.pop("lm_head.weight", None)    # a copy of the embedding, which some tools save
    for rule in rules:
        size = [shape.vocab_size if length is None else length for length in rule.megatron_shape(shape)]
        for name, rows in zip(rule.hf, rule.hf_rows(size[0], shape), strict=True):
            wanted = (sum(map(len, rows)), *size[1:])
            if name not in left_over:
                raise UserError(f"{source.folder} has no {name}, but a model as {CONFIG_FILE} describes it "
                                "does: the two do not belong together")
            del left_over[name]
            source.dtype(name)
            if source.shape(name) != wanted:
                raise UserError(f"{source.folder}: {name} has shape {list(source.shape(name))}, but a "
                                f"model as {CONFIG_FILE} describes it has {list(wanted)}: the two do "
                                "not belong together")
    if left_over:
        raise UserError(f"{source.folder} has {next(iter(left_over))}, for which a model as {CONFIG_FILE} "
                        "describes it has no place: only such models can be converted")


def _find_tokenizer(folder: Path, options: ImportOptions) -> TokenizerConfig:
    """The tokenizer that is given, or else the one in the folder."""
    path = options.tokenizer_path or folder
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        path = models[0] if len(models) == 1 else path
    if options.tokenizer_path is None and path == folder and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer: give --tokenizer-model, the one that the model was "
                        "trained with")
    kind = options.tokenizer_type or (
        "SentencePieceTokenizer" if path.suffix == ".model" else "HuggingFaceTokenizer")
    config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(path.absolute()),
                             tokenizer_sentencepiece_legacy=options.tokenizer_legacy)
    legacy = dataclasses.replace(config, tokenizer_sentencepiece_legacy=True)
    trained = _exported_fingerprint(folder)
    if kind == "SentencePieceTokenizer" and trained and build_tokenizer(legacy).fingerprint == trained:
        return legacy
    return config


def _exported_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the tokenizer a model was trained with, where this project exported it."""
    try:
        return orjson.loads((folder / EXPORT_FILE).read_bytes())["tokenizer_fingerprint"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _check_written(plan: ImportPlan, checkpoint: TorchDistCheckpoint) -> None:
    """Take every tensor back, put together by torch in memory, and compare it with what it was made of."""
    import torch

    from megatron.pretrain.export.verify import same_bits

    checkpoint.check()
    for rule in plan.rules:
        written = checkpoint.read(rule.megatron[-1])
        for name, rows in zip(rule.hf, rule.hf_rows(len(written), plan.shape), strict=True):
            meant = plan.source.tensor(name).load().to(written.dtype)
            if not same_bits(torch.cat([written[some.start:some.stop] for some in rows]), meant):
                raise UserError(f"{checkpoint.folder}: {rule.megatron[-1]} does not give {name} back: what "
                                "was written is not what was read; is the disk sound?")


def _model_config(shape: ModelShape) -> ModelConfig:
    return ModelConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=shape.num_query_groups != shape.num_attention_heads,
        num_query_groups=shape.num_query_groups, kv_channels=shape.kv_channels,
        max_position_embeddings=shape.max_position_embeddings, norm_epsilon=shape.norm_epsilon,
        rotary_base=shape.rotary_base, untie_embeddings_and_output_weights=not shape.tied_embeddings,
        init_method_std=shape.init_method_std)


def _manifest(plan: ImportPlan, folder: Path) -> Manifest:
    """run.json: with no mixture, so that only --finetune may start from it."""
    config = run_config(_model_config(plan.shape), plan.tokenizer_config).as_dict()
    config["model"]["padded_vocab_size"] = plan.shape.padded_vocab_size
    return Manifest(
        iteration=ITERATION, consumed_samples=0, consumed_tokens=0, config=config,
        tokenizer=describe_tokenizer(plan.tokenizer_config, plan.tokenizer), mixture_hash="", train_state={},
        versions=package_versions(), file_bytes=file_sizes(folder), file_ends=file_ends(folder))


def _common(plan: ImportPlan) -> dict[str, Any]:
    """common.pt: what Megatron-LM keeps of a run, for Megatron-LM; this project has run.json instead."""
    if not plan.for_megatron_lm:
        return {}
    model, tokenizer = dataclasses.asdict(_model_config(plan.shape)), plan.tokenizer_config
    args = argparse.Namespace(
        **model, padded_vocab_size=plan.shape.padded_vocab_size, qk_layernorm=plan.architecture.has_qk_norm,
        seq_length=plan.shape.max_position_embeddings, normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, add_qkv_bias=False, position_embedding_type="rope", rotary_percent=1.0,
        rotary_interleaved=False,
        tokenizer_type=tokenizer.tokenizer_type, tokenizer_model=tokenizer.tokenizer_model,
        legacy_tokenizer=tokenizer.tokenizer_sentencepiece_legacy, vocab_size=None,
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, consumed_train_samples=0,
        consumed_valid_samples=0, iteration=ITERATION)
    return {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION,
            "num_floating_point_operations_so_far": 0}
