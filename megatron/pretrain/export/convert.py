"""One checkpoint to one Hugging Face folder."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.errors import UserError
from megatron.pretrain.export import EXPORT_FILE
from megatron.pretrain.export.card import model_card
from megatron.pretrain.export.checkpoints import Checkpoint, architecture_of, describe, open_checkpoint
from megatron.pretrain.export.copying import Copy, Rows, copy_all
from megatron.pretrain.export.elements import WEIGHT_TYPES, ElementType
from megatron.pretrain.export.hf import TensorSpec, begin_safetensors, write_json
from megatron.pretrain.export.hf_config import CONFIG_FILE, SpecialIds, config_json, generation_config
from megatron.pretrain.export.names import Architecture, Rule
from megatron.pretrain.export.shape import ModelShape, model_shape
from megatron.pretrain.export.tokenizer_files import TokenizerSource, find_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.pretrain.export.verify import Verified

_VOCABULARY = "VOCAB_SIZE (--vocab-size)"


@dataclass(frozen=True)
class Options:
    """What a user may choose. None: as the checkpoint has it."""

    vocab_size: int | None = None
    tokenizer_path: Path | None = None
    dtype: ElementType | None = None
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
        TensorSpec(hf_name, (sum(map(len, rows)), *checkpoint.shape(name)[1:]),
                   options.dtype or checkpoint.dtype(name))
        for name, rule in rules
        for hf_name, rows in _apply(rule, checkpoint.shape(name)[0], shape))
    _check_rows(checkpoint.shape(rules[0][0])[0], shape)
    checkpoint.check_files()
    return Plan(checkpoint, manifest, architecture, shape, rules, specs, tokenizer, options.max_shard_bytes)


def run_conversion(plan: Plan, target: Path, on_bytes: Callable[[int], None] = lambda size_bytes: None,
                   *, verify: bool = False) -> Verified | None:
    """Write `target`, which must not exist, whole or not at all; `on_bytes` hears of each tensor written.

    With `verify` the folder gets its name only after the checkpoint has been held against its own checksums,
    what was written, read back from the disk, against it, and the logits of both sides against each other.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if verify:
        # Its torch and transformers take seconds to load; that one is missing should be told before.
        from megatron.pretrain.export.verify import transformers

        transformers()
    sources = dict(_sources(plan))
    try:
        partial.mkdir(parents=True)
        places = begin_safetensors(partial, plan.specs, plan.max_shard_bytes)
        copies = [Copy(place.spec.name, place.path, place.offset_bytes, sources[place.spec.name],
                       place.spec.dtype) for place in places]
        for copied in copy_all(copies, checksums=False):
            on_bytes(copied.size_bytes)
        _write_descriptions(plan, partial, target.name)
        verified = _verify(plan, partial) if verify else None
        partial.rename(target)
        return verified
    except OSError as problem:
        raise UserError(f"{target} could not be written: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(plan: Plan, folder: Path) -> Verified:
    from megatron.pretrain.export.verify import Verified, check_written, compare_logits

    plan.checkpoint.check()
    check_written(folder, plan.specs, _meant(plan))
    off, why_not = compare_logits(folder, plan.checkpoint.read, plan.checkpoint.names(), plan.shape,
                                  plan.specs[0].dtype, plan.parameters)
    return Verified(len(plan.specs), off, why_not)


def _meant(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """What each tensor of the folder should be, put together by torch in memory."""
    import torch

    types = {spec.name: spec.dtype.of_torch for spec in plan.specs}
    for name, rule in plan.rules:
        whole = plan.checkpoint.read(name)
        for hf_name, rows in _apply(rule, len(whole), plan.shape):
            yield hf_name, torch.cat([whole[some.start:some.stop] for some in rows]).to(types[hf_name])


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


def _check_rows(saved: int, shape: ModelShape) -> None:
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
        if checkpoint.dtype(name) not in WEIGHT_TYPES.values():
            raise UserError(f"{folder}: {name} is of type {checkpoint.dtype(name).name}; only "
                            f"{', '.join(WEIGHT_TYPES)} can be converted")
        yield name, rule
    if left_over:
        raise UserError(f"{folder} has {next(iter(left_over))}, for which a {architecture.name} as run.json "
                        "describes it has no place: only such models can be converted")


def _apply(rule: Rule, rows: int, shape: ModelShape) -> Iterator[tuple[str, list[range]]]:
    """Each Hugging Face tensor of the rule, and which of the `rows` of Megatron's it consists of."""
    return zip(rule.hf, rule.hf_rows(rows, shape), strict=True)


def _sources(plan: Plan) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """What each tensor is made of. Raises UserError where the checkpoint is damaged."""
    for name, rule in plan.rules:
        tensor = plan.checkpoint.tensor(name)
        for hf_name, rows in _apply(rule, tensor.shape[0], plan.shape):
            yield hf_name, tuple(Rows(tensor, some.start, some.stop) for some in rows)


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
        "dtype": dtype.name,
    })
    card = model_card(manifest, plan.shape, plan.architecture.name, dtype, plan.parameters, name)
    (folder / "README.md").write_text(card, encoding="utf-8")
