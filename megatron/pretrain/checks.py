"""The rules between settings: what cannot run is refused before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.optim.schedule import schedule_of

# What a number must be, and the settings that must be so. A setting that is None was not given.
RANGES: tuple[tuple[str, Callable[[float], bool], dict[str, tuple[str, ...]]], ...] = (
    ("1 or more", lambda value: value >= 1, {
        "model": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                  "kv_channels", "max_position_embeddings", "make_vocab_size_divisible_by"),
        "layout": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                   "num_layers_per_virtual_pipeline_stage", "distributed_timeout_minutes"),
        "tokenizer": ("vocab_size",),
        "data": ("seq_length",),
        "optim": ("lr_decay_iters",),
        "train": ("micro_batch_size", "global_batch_size", "train_iters", "exit_interval", "eval_interval",
                  "recompute_num_layers", "max_skipped_iterations"),
        "checkpoint": ("save_interval",),
        "log": ("log_interval",)}),
    ("0 or more", lambda value: value >= 0, {
        "data": ("num_workers",),
        "optim": ("min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay", "clip_grad"),
        "train": ("eval_iters", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")}),
    ("above 0", lambda value: value > 0, {
        "model": ("norm_epsilon", "rotary_base", "init_method_std"),
        "optim": ("lr", "adam_eps"),
        "train": ("exit_duration_in_mins",)}),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, {
        "model": ("attention_dropout", "hidden_dropout"),
        "optim": ("adam_beta1", "adam_beta2")}),
    # Every pipeline stage seeds numpy, which takes 32 bits, with a number of its own above this one.
    ("at least 0 and below 2147483648", lambda value: 0 <= value < 2**31, {"train": ("seed",)}),
)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks: the world divided by TP x PP x CP. Raises UserError where that leaves a rest."""
    layout = config.layout
    tp, pp, cp = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size,
                  layout.context_parallel_size)
    model_size = tp * pp * cp
    _require(
        world_size % model_size == 0,
        f"{world_size} processes cannot be shared out: TP {tp} x PP {pp} x CP {cp} = {model_size} must "
        f"divide them; start a multiple of {model_size} processes or lower a parallel size")
    return world_size // model_size


def settle(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with its global batch size, after every rule held. Raises UserError otherwise."""
    _check_ranges(config)
    dp = data_parallel_size(config, world_size)
    if config.train.global_batch_size is None:
        train = dataclasses.replace(config.train, global_batch_size=config.train.micro_batch_size * dp)
        config = dataclasses.replace(config, train=train)
    _check_batch(config, dp)
    _check_model(config)
    _check_pipeline(config)
    _check_sequence(config)
    _check_overlap(config)
    _check_recompute(config)
    _check_fused(config)
    _check_fp8(config)
    _check_cuda_graph(config)
    _check_schedule(config)
    _check_checkpoint(config)
    return config


def _require(truth: bool, sentence: str) -> None:
    if not truth:
        raise UserError(sentence)


def _check_ranges(config: RunConfig) -> None:
    for wanted, holds, sections in RANGES:
        for section, names in sections.items():
            for name in names:
                value = getattr(getattr(config, section), name)
                _require(value is None or holds(value),
                         f"--{name.replace('_', '-')} {value}: must be {wanted}")


def _check_batch(config: RunConfig, dp: int) -> None:
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size
    _require(
        whole % (micro * dp) == 0,
        f"--global-batch-size {whole} is not a multiple of micro-batch {micro} x data-parallel size {dp} = "
        f"{micro * dp}; the nearest that is: {max(1, round(whole / (micro * dp))) * micro * dp}")
    pp, micro_batches = config.layout.pipeline_model_parallel_size, whole // (micro * dp)
    _require(
        config.layout.num_layers_per_virtual_pipeline_stage is None or micro_batches % pp == 0,
        f"--num-layers-per-virtual-pipeline-stage: the interleaved schedule needs micro-batches "
        f"({micro_batches} a step) in a multiple of --pipeline-model-parallel-size {pp}")


def _check_model(config: RunConfig) -> None:
    model, tp = config.model, config.layout.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.kv_heads
    _require(model.group_query_attention or groups == heads,
             f"--num-query-groups {groups} needs --group-query-attention")
    _require(heads % groups == 0,
             f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}")
    _require(heads % tp == 0,
             f"--num-attention-heads {heads} is not a multiple of --tensor-model-parallel-size {tp}")
    _require(groups % tp == 0 or tp % groups == 0,
             f"--num-query-groups {groups} neither divides --tensor-model-parallel-size {tp} nor is a "
             "multiple of it")
    _require(model.ffn_hidden_size % tp == 0,
             f"--ffn-hidden-size {model.ffn_hidden_size} is not a multiple of --tensor-model-parallel-size "
             f"{tp}")
    _require(model.head_dim % 2 == 0,
             f"--kv-channels {model.head_dim}: rotary embedding needs an even number")


def _check_pipeline(config: RunConfig) -> None:
    layers, pp = config.model.num_layers, config.layout.pipeline_model_parallel_size
    chunk = config.layout.num_layers_per_virtual_pipeline_stage
    _require(layers % pp == 0,
             f"--num-layers {layers} is not a multiple of --pipeline-model-parallel-size {pp}")
    if chunk is not None:
        _require(pp > 1,
                 "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1")
        _require((layers // pp) % chunk == 0 and layers // pp > chunk,
                 f"--num-layers-per-virtual-pipeline-stage {chunk} must divide the {layers // pp} layers of "
                 "a stage, and be less")


def _check_sequence(config: RunConfig) -> None:
    layout, seq = config.layout, config.data.seq_length
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    _require(not layout.sequence_parallel or tp > 1,
             "--sequence-parallel needs --tensor-model-parallel-size above 1")
    _require(not layout.sequence_parallel or seq % (tp * cp) == 0,
             f"--sequence-parallel: --seq-length {seq} is not a multiple of {tp * cp}")
    _require(cp == 1 or config.model.transformer_impl == "transformer_engine",
             f"--context-parallel-size {cp} needs --transformer-impl transformer_engine: torch's attention "
             "cannot share a sequence")
    _require(cp == 1 or seq % (2 * cp) == 0,
             f"--seq-length {seq} is not a multiple of 2 x --context-parallel-size {cp}")


def _check_overlap(config: RunConfig) -> None:
    layout = config.layout
    _require(not layout.overlap_param_gather or layout.use_distributed_optimizer,
             "--overlap-param-gather needs --use-distributed-optimizer")
    _require(not layout.overlap_param_gather or layout.overlap_grad_reduce,
             "--overlap-param-gather needs --overlap-grad-reduce")


def _check_recompute(config: RunConfig) -> None:
    train, layout = config.train, config.layout
    full, unit = train.recompute_granularity == "full", train.recompute_num_layers
    _require(full == (train.recompute_method is not None) and full == (unit is not None),
             "--recompute-method and --recompute-num-layers go with --recompute-granularity full, "
             "and it needs both")
    _require(not (full and train.recompute_activations),
             "--recompute-activations means --recompute-granularity selective, and full is given: leave one "
             "out")
    unknown = set(train.recompute_modules) - {"core_attn", "mlp"}
    _require(not unknown, f"--recompute-modules {' '.join(sorted(unknown))}: must be core_attn or mlp")
    _require(train.recompute_modules == ("core_attn",) or train.recompute_granularity == "selective",
             "--recompute-modules goes with --recompute-granularity selective")
    held = layout.num_layers_per_virtual_pipeline_stage or (
        config.model.num_layers // layout.pipeline_model_parallel_size)
    # The engine walks on in steps of a unit, past the last layer where they do not fit.
    _require(train.recompute_method != "uniform" or held % unit == 0,
             f"--recompute-num-layers {unit} must divide the {held} layers that a rank holds in one piece")


def _check_fused(config: RunConfig) -> None:
    model = config.model
    _require(model.transformer_impl != "fused" or model.attention_dropout == model.hidden_dropout == 0,
             "--transformer-impl fused has no dropout: leave out --attention-dropout and --hidden-dropout, or "
             "use --transformer-impl local")


def _check_fp8(config: RunConfig) -> None:
    model, layout, train = config.model, config.layout, config.train
    if train.fp8_format is None:
        _require(not train.first_last_layers_bf16,
                 "--first-last-layers-bf16 needs --fp8-format hybrid (--fp8)")
        return
    _require(train.bf16, f"--fp8-format {train.fp8_format} needs --bf16")
    _require(model.transformer_impl in ("auto", "fused"),
             f"--fp8-format {train.fp8_format}: --transformer-impl {model.transformer_impl} has no fp8 here; "
             "use fused or auto")
    _require(model.attention_dropout == model.hidden_dropout == 0,
             f"--fp8-format {train.fp8_format}: the fused layers have no dropout; leave out "
             "--attention-dropout and --hidden-dropout")
    tp, heads = layout.tensor_model_parallel_size, model.num_attention_heads
    sizes = {
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size / --tensor-model-parallel-size": model.ffn_hidden_size // tp,
        "heads x --kv-channels / --tensor-model-parallel-size": heads * model.head_dim // tp,
        "(heads + 2 x groups) x --kv-channels / --tensor-model-parallel-size":
            (heads + 2 * model.kv_heads) * model.head_dim // tp,
        "--micro-batch-size x --seq-length": train.micro_batch_size * config.data.seq_length}
    for name, size in sizes.items():
        _require(size % 16 == 0,
                 f"--fp8-format {train.fp8_format}: {name} is {size}, and fp8 products take multiples of 16")


def _check_cuda_graph(config: RunConfig) -> None:
    if not config.train.enable_cuda_graph:
        return
    layout = config.layout
    _require(config.model.transformer_impl in ("auto", "fused"),
             f"--enable-cuda-graph: --transformer-impl {config.model.transformer_impl} is not recorded here; use fused")
    _require(layout.pipeline_model_parallel_size == 1,
             f"--enable-cuda-graph: --pipeline-model-parallel-size {layout.pipeline_model_parallel_size}; "
             "a pipeline's micro-batches are not recorded, leave out one of them")
    overlapped = " and ".join(flag for flag, is_set in (
        ("--overlap-grad-reduce", layout.overlap_grad_reduce),
        ("--overlap-param-gather", layout.overlap_param_gather)) if is_set)
    _require(not overlapped,
             f"--enable-cuda-graph: what hooks start and wait for with {overlapped} is not recorded; leave it, or "
             "the graph, out")
    _require(config.train.recompute_granularity != "full",
             "--enable-cuda-graph: --recompute-granularity full is not recorded; use selective, or leave out one")


def _check_schedule(config: RunConfig) -> None:
    optim = config.optim
    decay_iters = optim.lr_decay_iters or config.train.train_iters
    _require(optim.lr_warmup_iters < decay_iters,
             f"--lr-warmup-iters {optim.lr_warmup_iters} must be below the {decay_iters} iterations of the "
             "schedule (--lr-decay-iters, or --train-iters)")
    schedule_of(config)


def _check_checkpoint(config: RunConfig) -> None:
    checkpoint = config.checkpoint
    _require(checkpoint.save_interval is None or checkpoint.save is not None,
             "--save-interval needs --save, the folder to save to")
    _require(not checkpoint.finetune or checkpoint.load is not None,
             "--finetune needs --load, the checkpoint whose weights to start from")
