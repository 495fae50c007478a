"""What a run reads, judged before anything is built: tokenizer, data, a checkpoint to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain.checkpoint import manifest as manifests
from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.config import DataConfig, RunConfig
from megatron.pretrain.data.dataset import PretrainDataset, open_dataset
from megatron.pretrain.data.blend import Blended, parse_blend
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this run may start from."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, read and found to fit together."""

    tokenizer: Tokenizer
    dataset: PretrainDataset
    valid_dataset: PretrainDataset | None
    checkpoint: Checkpoint | None


def open_inputs(config: RunConfig) -> Inputs:
    """Open what the configuration names. Raises UserError for what is missing or does not fit the run."""
    train, tokenizer = config.train, build_tokenizer(config.tokenizer)
    blended = blend_of(config.data)
    dataset = _open(config, blended, tokenizer, "train")
    dataset.check_holds(train.train_iters * train.global_batch_size)
    valid_dataset = _open(config, blended, tokenizer, "valid") if train.eval_iters else None
    if valid_dataset is not None:
        valid_dataset.check_holds(train.eval_iters * train.global_batch_size, "--eval-iters")
    if config.checkpoint.save is not None:
        manifests.check_can_save(config.checkpoint.save)
    checkpoint = None
    if config.checkpoint.load is not None:
        checkpoint = _open_checkpoint(config, tokenizer, dataset)
    return Inputs(tokenizer=tokenizer, dataset=dataset, valid_dataset=valid_dataset, checkpoint=checkpoint)


def blend_of(data: DataConfig) -> list[Blended]:
    """The blend that --data-path, or the file of --data-args-path, names."""
    if bool(data.data_path) == bool(data.data_args_path):
        raise UserError("give either --data-path or --data-args-path: the datasets to train on")
    if data.data_args_path is None:
        return parse_blend(data.data_path)
    path = Path(data.data_args_path)
    try:
        return parse_blend(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(f"--data-args-path {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--data-args-path {path}: not text; it must hold what --data-path takes") from None


def describe_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as a checkpoint remembers it."""
    return {"type": config.tokenizer.tokenizer_type, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id}


def _open(config: RunConfig, blended: list[Blended], tokenizer: Tokenizer, part: str) -> PretrainDataset:
    data = config.data
    return open_dataset(
        blended, tokenizer=tokenizer, seq_length=data.seq_length, seed=config.train.seed,
        data_weights=data.data_weights, enable_shuffle=data.enable_shuffle, eod_mask_loss=data.eod_mask_loss,
        split=data.split, part=part)


def _open_checkpoint(config: RunConfig, tokenizer: Tokenizer, dataset: PretrainDataset) -> Checkpoint:
    folder = manifests.find_checkpoint(config.checkpoint.load)
    manifest = manifests.read_manifest(folder)
    manifests.check_same_model(manifest, config, folder)
    manifests.check_same_tokenizer(manifest, describe_tokenizer(config, tokenizer), folder)
    if not config.checkpoint.finetune:
        override = config.checkpoint.override_data
        manifests.check_same_data(manifest, dataset.content_hash(), folder, override=override)
        manifests.check_same_precision(manifest, config, folder)
        manifests.check_same_schedule(manifest, config, folder)
    return Checkpoint(folder, manifest)
