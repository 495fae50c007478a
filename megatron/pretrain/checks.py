"""The rules between settings: what cannot run is refused before anything starts."""

from __future__ import annotations

import dataclasses

from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks: the world divided by TP x PP x CP. Raises UserError where that leaves a rest."""
    layout = config.layout
    tp, pp, cp = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size,
                  layout.context_parallel_size)
    model_size = tp * pp * cp
    if min(tp, pp, cp) < 1:
        raise UserError(f"TP {tp}, PP {pp}, CP {cp}: parallel sizes must be 1 or more")
    if world_size % model_size:
        raise UserError(
            f"{world_size} processes cannot be shared out: TP {tp} x PP {pp} x CP {cp} = {model_size} must "
            f"divide them; start a multiple of {model_size} processes or lower a parallel size")
    return world_size // model_size


def settle(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with its global batch size, after every rule held. Raises UserError otherwise."""
    dp = data_parallel_size(config, world_size)
    if config.train.global_batch_size is None:
        train = dataclasses.replace(config.train, global_batch_size=config.train.micro_batch_size * dp)
        config = dataclasses.replace(config, train=train)
    _check_positive(config)
    _check_batch(config, dp)
    _check_model(config)
    _check_layout(config)
    _check_schedule(config)
    _check_checkpoint(config)
    return config


def _require(truth: bool, sentence: str) -> None:
    if not truth:
        raise UserError(sentence)


def _check_positive(config: RunConfig) -> None:
    for section, names in {
        config.model: ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                       "num_query_groups", "kv_channels", "make_vocab_size_divisible_by"),
        config.data: ("seq_length",),
        config.train: ("micro_batch_size", "global_batch_size", "train_iters", "eval_interval"),
        config.log: ("log_interval",),
    }.items():
        for name in names:
            value = getattr(section, name)
            _require(value >= 1, f"--{name.replace('_', '-')} {value}: must be 1 or more")
    for name in ("exit_interval", "exit_duration_in_mins"):
        value = getattr(config.train, name)
        _require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: must be above 0")


def _check_batch(config: RunConfig, dp: int) -> None:
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size
    _require(
        whole % (micro * dp) == 0,
        f"--global-batch-size {whole} is not a multiple of micro-batch {micro} x data-parallel size {dp} = "
        f"{micro * dp}; the nearest that is: {max(1, round(whole / (micro * dp))) * micro * dp}")
    layout = config.layout
    if layout.num_layers_per_virtual_pipeline_stage is not None:
        pp, micro_batches = layout.pipeline_model_parallel_size, whole // (micro * dp)
        _require(
            micro_batches % pp == 0,
            f"--num-layers-per-virtual-pipeline-stage: the interleaved schedule needs micro-batches "
            f"({micro_batches} a step) in a multiple of --pipeline-model-parallel-size {pp}")


def _check_model(config: RunConfig) -> None:
    model, tp = config.model, config.layout.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.kv_heads
    _require(heads % groups == 0,
             f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}")
    _require(heads % tp == 0,
             f"--num-attention-heads {heads} is not a multiple of --tensor-model-parallel-size {tp}")
    _require(groups % tp == 0 or tp % groups == 0,
             f"--num-query-groups {groups} neither divides --tensor-model-parallel-size {tp} nor is a multiple "
             "of it")
    _require(model.ffn_hidden_size % tp == 0,
             f"--ffn-hidden-size {model.ffn_hidden_size} is not a multiple of --tensor-model-parallel-size {tp}")
    _require(model.head_dim % 2 == 0, f"--kv-channels {model.head_dim}: rotary embedding needs an even number")
    _require(config.data.seq_length <= model.max_position_embeddings,
             f"--seq-length {config.data.seq_length} is above --max-position-embeddings "
             f"{model.max_position_embeddings}")


def _check_layout(config: RunConfig) -> None:
    layout, layers, seq = config.layout, config.model.num_layers, config.data.seq_length
    tp, pp, cp = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size,
                  layout.context_parallel_size)
    _require(layers % pp == 0,
             f"--num-layers {layers} is not a multiple of --pipeline-model-parallel-size {pp}")
    chunk = layout.num_layers_per_virtual_pipeline_stage
    if chunk is not None:
        _require(pp > 1, "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1")
        _require(chunk >= 1 and (layers // pp) % chunk == 0 and layers // pp > chunk,
                 f"--num-layers-per-virtual-pipeline-stage {chunk} must divide the {layers // pp} layers of a "
                 "stage, and be less")
    _require(not layout.sequence_parallel or tp > 1,
             "--sequence-parallel needs --tensor-model-parallel-size above 1")
    _require(not layout.sequence_parallel or seq % (tp * cp) == 0,
             f"--sequence-parallel: --seq-length {seq} is not a multiple of {tp * cp}")
    _require(cp == 1 or config.model.transformer_impl == "transformer_engine",
             f"--context-parallel-size {cp} needs --transformer-impl transformer_engine: torch's attention "
             "cannot share a sequence")
    _require(cp == 1 or seq % (2 * cp) == 0,
             f"--seq-length {seq} is not a multiple of 2 x --context-parallel-size {cp}")
    _require(not layout.overlap_param_gather or layout.use_distributed_optimizer,
             "--overlap-param-gather needs --use-distributed-optimizer")
    _require(not layout.overlap_param_gather or layout.overlap_grad_reduce,
             "--overlap-param-gather needs --overlap-grad-reduce")
    full = config.train.recompute_granularity == "full"
    _require(full == (config.train.recompute_method is not None)
             and full == (config.train.recompute_num_layers is not None),
             "--recompute-method and --recompute-num-layers go with --recompute-granularity full, "
             "and it needs both")


def _check_schedule(config: RunConfig) -> None:
    optim = config.optim
    decay_iters = optim.lr_decay_iters or config.train.train_iters
    _require(optim.lr_warmup_iters < decay_iters,
             f"--lr-warmup-iters {optim.lr_warmup_iters} must be below the {decay_iters} iterations of the "
             "schedule (--lr-decay-iters, or --train-iters)")
    _require(0 <= optim.min_lr <= optim.lr,
             f"--min-lr {optim.min_lr} must lie between 0 and --lr {optim.lr}")


def _check_checkpoint(config: RunConfig) -> None:
    checkpoint = config.checkpoint
    _require(checkpoint.save_interval is None or checkpoint.save_interval >= 1,
             f"--save-interval {checkpoint.save_interval}: must be 1 or more")
    _require(checkpoint.save_interval is None or checkpoint.save is not None,
             "--save-interval needs --save, the folder to save to")
    _require(not checkpoint.finetune or checkpoint.load is not None,
             "--finetune needs --load, the checkpoint whose weights to start from")
