"""A run put together: data, model, optimizer, schedule and state, fresh or from a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields

from megatron.core.optimizer import MegatronOptimizer

from megatron.pretrain.checkpoint.manifest import Manifest, package_versions
from megatron.pretrain.checkpoint.store import load_everything, load_weights
from megatron.pretrain.config import RunConfig
from megatron.pretrain.data.batches import BatchSchedule
from megatron.pretrain.data.dataset import PretrainDataset
from megatron.pretrain.layout import Place
from megatron.pretrain.model.build import build_model
from megatron.pretrain.model.flops import padded_vocab_size
from megatron.pretrain.optim.optimizer import build_optimizer
from megatron.pretrain.optim.schedule import LrSchedule, schedule_of
from megatron.pretrain.tokenizer import Tokenizer
from megatron.pretrain.train.inputs import Checkpoint, Inputs, describe_tokenizer
from megatron.pretrain.train.state import TrainState
from megatron.pretrain.train.step import Chunks, connect, record

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
            versions=package_versions())


def assemble(config: RunConfig, place: Place, inputs: Inputs) -> Run:
    """Build every part around the opened inputs, and load the checkpoint among them."""
    tokenizer = inputs.tokenizer
    chunks = build_model(config, padded_vocabulary(config, tokenizer.vocab_size), place.device)
    optimizer = build_optimizer(config, chunks)
    connect(chunks, optimizer)
    run = Run(
        config=config, place=place, tokenizer=tokenizer, dataset=inputs.dataset,
        valid_dataset=inputs.valid_dataset,
        batches=BatchSchedule(
            global_batch_size=config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size,
            data_parallel_size=place.data_parallel_size, data_parallel_rank=place.data_parallel_rank),
        chunks=chunks, optimizer=optimizer, schedule=schedule_of(config), state=TrainState())
    if config.train.enable_cuda_graph:
        record(chunks[0], run.batches.micro_batches)
    if inputs.checkpoint is not None:
        _restore(run, inputs.checkpoint)
    return run


def padded_vocabulary(config: RunConfig, vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary padded so that tensor-parallel ranks share it evenly."""
    return padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by,
                             config.layout.tensor_model_parallel_size)


def _restore(run: Run, start: Checkpoint) -> None:
    folder, manifest = start.folder, start.manifest
    if run.config.checkpoint.finetune:
        load_weights(folder, run.chunks, run.optimizer)
        logger.info("loaded the weights of %s; the run starts at iteration 0", folder)
        return
    for field in fields(TrainState):
        setattr(run.state, field.name, manifest.train_state[field.name])
    if run.config.checkpoint.no_load_optim:
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
