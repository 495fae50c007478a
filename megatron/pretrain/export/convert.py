"""One checkpoint to one Hugging Face folder."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.errors import UserError
from megatron.pretrain.export import EXPORT_FILE
from megatron.pretrain.export.ahead import one_ahead
from megatron.pretrain.export.card import model_card
from megatron.pretrain.export.checkpoints import Checkpoint, architecture_of, describe, open_checkpoint
from megatron.pretrain.export.hf import TensorSpec, write_json, write_safetensors
from megatron.pretrain.export.hf_config import CONFIG_FILE, SpecialIds, config_json, generation_config
from megatron.pretrain.export.names import Architecture, Rule
from megatron.pretrain.export.shape import ModelShape, model_shape
from megatron.pretrain.export.tokenizer_files import TokenizerSource, find_tokenizer, write_tokenizer
from megatron.pretrain.export.verify import (
    Verified, check_written, compare_logits, noting_checksums, transformers)

_VOCABULARY = "VOCAB_SIZE (--vocab-size)"


@dataclass(frozen=True)
class Options:
    """What a user may choose. None: as the checkpoint has it."""

    vocab_size: int | None = None
    tokenizer_path: Path | None = None
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    architecture: str | None = None


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked as far as it can be without reading the weights."""

    checkpoint: Checkpoint
    manifest: Manifest
    architecture: Architecture
    shape: ModelShape
    rules: tuple[tuple[str, Rule], ...]
    specs: tuple[TensorSpec, ...]
    tokenizer: TokenizerSource | None
    max_shard_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights to be written."""
        return sum(spec.size_bytes for spec in self.specs)

    @property
    def parameters(self) -> int:
        """Numbers that the model consists of."""
        return sum(math.prod(spec.shape) for spec in self.specs)


def plan_conversion(folder: Path, options: Options) -> Plan:
    """Check one iteration's folder against what describes it, the tokenizer and `options`; reads no weights.

    Raises UserError naming what is missing, damaged or contradictory.
    """
    checkpoint = open_checkpoint(folder)
    manifest = describe(checkpoint, options.tokenizer_path)
    _check_iteration(folder, manifest)
    architecture = architecture_of(manifest, options.architecture)
    tokenizer = find_tokenizer(manifest, options.tokenizer_path)
    shape = model_shape(manifest, _vocabulary(manifest, options.vocab_size))
    rules = tuple(_match(checkpoint, architecture, shape))
    specs = tuple(
        TensorSpec(hf_name, tuple(tensor.shape), options.dtype or tensor.dtype)
        for name, rule in rules
        for hf_name, tensor in _apply(rule, _on_meta(checkpoint, name), shape))
    _check_rows(specs, shape)
    checkpoint.check_files()
    return Plan(checkpoint, manifest, architecture, shape, rules, specs, tokenizer, options.max_shard_bytes)


def run_conversion(plan: Plan, target: Path, on_bytes: Callable[[int], None] = lambda size_bytes: None,
                   *, verify: bool = False) -> Verified | None:
    """Write `target`, which must not exist, whole or not at all; `on_bytes` hears of each tensor written.

    With `verify` the folder gets its name only after what was read has been held against the checkpoint's own
    checksums, what was written against what was read, and the logits of both sides against each other.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    checksums: dict[str, int] = {}
    tensors = _stream(plan, checked=verify)
    if verify:
        transformers()    # or its absence would be told when all is written
        tensors = noting_checksums(tensors, checksums)
    try:
        partial.mkdir(parents=True)
        for size_bytes in write_safetensors(partial, plan.specs, one_ahead(tensors), plan.max_shard_bytes):
            on_bytes(size_bytes)
        _write_descriptions(plan, partial, target.name)
        verified = _verify(plan, partial, checksums) if verify else None
        partial.rename(target)
        return verified
    except OSError as problem:
        raise UserError(f"{target} could not be written: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(plan: Plan, folder: Path, checksums: Mapping[str, int]) -> Verified:
    check_written(folder, plan.specs, checksums)
    off, why_not = compare_logits(folder, plan.checkpoint.read, plan.checkpoint.names(), plan.shape,
                                  plan.specs[0].dtype, plan.parameters)
    return Verified(len(plan.specs), off, why_not)


def _check_iteration(folder: Path, manifest: Manifest) -> None:
    named = re.fullmatch(r"iter_(\d+)", folder.name)
    if named and int(named[1]) != manifest.iteration:
        raise UserError(f"{folder} says of itself that it is iteration {manifest.iteration}: files of two "
                        "iterations are mixed, or the folder was renamed; copy the checkpoint again")


def _vocabulary(manifest: Manifest, wanted: int | None) -> int:
    """Rows to keep: all that were trained, and none of the padding unless it is asked for."""
    trained = manifest.tokenizer["vocab_size"]
    if wanted is not None and wanted < trained:
        raise UserError(f"{_VOCABULARY} is {wanted}, but the model was trained with {trained} ids: "
                        f"give {trained} or leave it out, no trained row is dropped")
    return trained if wanted is None else wanted


def _check_rows(specs: Sequence[TensorSpec], shape: ModelShape) -> None:
    saved = specs[0].shape[0]
    if saved < shape.vocab_size:
        raise UserError(f"{_VOCABULARY} is {shape.vocab_size}, but the checkpoint has only {saved} rows "
                        "with its padding: leave it out, and those that were trained are kept")


def _match(checkpoint: Checkpoint, architecture: Architecture,
           shape: ModelShape) -> Iterator[tuple[str, Rule]]:
    """Pair every rule with the name its tensor was saved under; neither may be left over."""
    folder, left_over = checkpoint.folder, dict.fromkeys(checkpoint.names())
    for rule in architecture.rules(shape):
        name = next((name for name in rule.megatron if name in left_over), None)
        if name is None:
            raise UserError(f"{folder} has no {rule.megatron[0]}, but a model as run.json describes it "
                            "does: the two do not belong together")
        del left_over[name]
        saved, expected = checkpoint.shape(name), rule.megatron_shape(shape)
        if len(saved) != len(expected) or any(e not in (None, s) for s, e in zip(saved, expected)):
            raise UserError(f"{folder}: {name} has shape {list(saved)}, but a model as run.json describes "
                            f"it has {['any' if e is None else e for e in expected]}: "
                            "the two do not belong together")
        yield name, rule
    if left_over:
        raise UserError(f"{folder} has {next(iter(left_over))}, for which a {architecture.name} as run.json "
                        "describes it has no place: only such models can be converted")


def _on_meta(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta")


def _apply(rule: Rule, tensor: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    return zip(rule.hf, rule.to_hf(tensor, shape), strict=True)


def _stream(plan: Plan, *, checked: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is to be written, in the order of the plan."""
    specs = iter(plan.specs)
    for name, rule in plan.rules:
        for hf_name, tensor in _apply(rule, plan.checkpoint.read(name, checked=checked), plan.shape):
            yield hf_name, _cast(hf_name, tensor, next(specs).dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16 != tensor.dtype:
        largest = tensor.abs().amax().item()
        if torch.finfo(dtype).max < largest < math.inf:
            raise UserError(f"{name} holds {largest:g}, and fp16 ends at {torch.finfo(dtype).max:g}: "
                            "take bf16 or fp32 (--dtype)")
    return tensor.to(dtype).contiguous()


def _write_descriptions(plan: Plan, folder: Path, name: str) -> None:
    """Everything but the weights; `name` is what the folder will be called."""
    manifest, dtype = plan.manifest, plan.specs[0].dtype
    ids = SpecialIds(manifest.tokenizer["bos_id"], manifest.tokenizer["eos_id"], manifest.tokenizer["eod_id"])
    write_json(folder / CONFIG_FILE, config_json(plan.architecture, plan.shape, ids, dtype))
    write_json(folder / "generation_config.json", generation_config(ids))
    if plan.tokenizer is not None:
        write_tokenizer(plan.tokenizer, folder, plan.shape.max_position_embeddings)
    write_json(folder / EXPORT_FILE, {
        "format": 1,
        "iteration": manifest.iteration,
        "consumed_tokens": manifest.consumed_tokens,
        "mixture_hash": manifest.mixture_hash,
        "tokenizer_fingerprint": manifest.tokenizer["fingerprint"],
        "vocab_size": plan.shape.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
    })
    card = model_card(manifest, plan.shape, plan.architecture.name, dtype, plan.parameters, name)
    (folder / "README.md").write_text(card, encoding="utf-8")
