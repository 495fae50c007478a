"""A run put together: data, model, optimizer, schedule and state, fresh or from a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron.pretrain.checkpoint import manifest as manifests
from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.checkpoint.store import load_everything, load_weights
from megatron.pretrain.config import DataConfig, RunConfig
from megatron.pretrain.data.batches import BatchSchedule
from megatron.pretrain.data.dataset import PretrainDataset, open_dataset
from megatron.pretrain.data.mixture import Blended, parse_blend
from megatron.pretrain.errors import UserError
from megatron.pretrain.layout import Place
from megatron.pretrain.model.build import build_model
from megatron.pretrain.model.flops import padded_vocab_size
from megatron.pretrain.optim.optimizer import build_optimizer
from megatron.pretrain.optim.schedule import LrSchedule, schedule_of
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer
from megatron.pretrain.train.state import TrainState
from megatron.pretrain.train.step import Chunks, connect

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run; only `state` changes, beside the weights themselves."""

    config: RunConfig
    place: Place
    tokenizer: Tokenizer
    dataset: PretrainDataset
    valid_dataset: PretrainDataset | None
    batches: BatchSchedule
    chunks: Chunks
    optimizer: MegatronOptimizer
    schedule: LrSchedule
    state: TrainState

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        return padded_vocabulary(self.config, self.tokenizer.vocab_size)

    def manifest(self) -> Manifest:
        """What a checkpoint of this moment says of itself."""
        config = self.config.as_dict()
        config["model"]["padded_vocab_size"] = self.padded_vocab_size
        state = self.state
        return Manifest(
            iteration=state.iteration, consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens, config=config,
            tokenizer=describe_tokenizer(self.config, self.tokenizer),
            mixture_hash=self.dataset.content_hash(), train_state=state.as_dict(),
            versions=manifests.package_versions())


def assemble(config: RunConfig, place: Place) -> Run:
    """Build every part and load the checkpoint that --load names. Raises UserError before anything trains."""
    tokenizer = build_tokenizer(config.tokenizer)
    blended = blend_of(config.data)
    dataset = _open(config, blended, tokenizer, "train")
    dataset.check_holds(config.train.train_iters * config.train.global_batch_size)
    valid_dataset = _open(config, blended, tokenizer, "valid") if config.train.eval_iters else None
    if valid_dataset is not None:
        valid_dataset.check_holds(config.train.eval_iters * config.train.global_batch_size, "--eval-iters")
    chunks = build_model(config, padded_vocabulary(config, tokenizer.vocab_size), place.device)
    optimizer = build_optimizer(config, chunks)
    connect(chunks, optimizer)
    run = Run(
        config=config, place=place, tokenizer=tokenizer, dataset=dataset, valid_dataset=valid_dataset,
        batches=BatchSchedule(
            global_batch_size=config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size,
            data_parallel_size=place.data_parallel_size, data_parallel_rank=place.data_parallel_rank),
        chunks=chunks, optimizer=optimizer, schedule=schedule_of(config), state=TrainState())
    if config.checkpoint.load is not None:
        _restore(run, manifests.find_checkpoint(config.checkpoint.load))
    return run


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


def padded_vocabulary(config: RunConfig, vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary padded so that tensor-parallel ranks share it evenly."""
    return padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by,
                             config.layout.tensor_model_parallel_size)


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


def _restore(run: Run, folder: Path) -> None:
    manifest = manifests.read_manifest(folder)
    checkpoint = run.config.checkpoint
    manifests.check_same_model(manifest, run.config, folder)
    manifests.check_same_tokenizer(manifest, describe_tokenizer(run.config, run.tokenizer), folder)
    if checkpoint.finetune:
        load_weights(folder, run.chunks, run.optimizer)
        logger.info("loaded the weights of %s; the run starts at iteration 0", folder)
        return
    manifests.check_same_data(manifest, run.dataset.content_hash(), folder, override=checkpoint.override_data)
    manifests.check_same_schedule(manifest, run.config, folder)
    for field in fields(TrainState):
        setattr(run.state, field.name, manifest.train_state[field.name])
    if checkpoint.no_load_optim:
        run.state.updates = 0
        load_weights(folder, run.chunks, run.optimizer)
    else:
        load_everything(folder, run.chunks, run.optimizer, updates=run.state.updates,
                        with_rng=_rng_fits(run, manifest))
    logger.info("resumed %s at iteration %d, %d consumed samples", folder, manifest.iteration,
                manifest.consumed_samples)


def _rng_fits(run: Run, manifest: Manifest) -> bool:
    """Random states are those of a rank: another layout cannot take them over (they only drive dropout)."""
    if run.config.checkpoint.no_load_rng:
        return False
    saved, wanted = manifest.config["layout"], asdict(run.config.layout)
    same = all(saved[name] == wanted[name]
               for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"))
    if not same:
        logger.info("random states are not taken over: the checkpoint's layout is another")
    return same
