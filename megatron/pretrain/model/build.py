"""From a `RunConfig` to megatron-core's GPT model, wrapped for data parallelism."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules, get_num_layers_to_build)
from megatron.core.utils import unwrap_model

from megatron.pretrain.config import LayoutConfig, RunConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.model.fused import peers
from megatron.pretrain.model.fused.accumulators import replace_instead_of_zeroing
from megatron.pretrain.model.fused.config import FusedConfig
from megatron.pretrain.model.fused.fp8_model import Fp8State
from megatron.pretrain.model.fused.kernels import (
    CHANGED_FLASH_ATTENTION, installed, installed_flash_attention, kernels_for, missing_packages,
    project_backward_is_for)
from megatron.pretrain.model.fused.model import FusedGPTModel, layer_spec
from megatron.pretrain.model.layers import CausalAttention, RMSNorm

FP8_CAPABILITY = (8, 9)

logger = logging.getLogger(__name__)


def build_model(config: RunConfig, padded_vocab_size: int, device: torch.device) -> list[DistributedDataParallel]:
    """The model chunks of this rank's pipeline stage (one, unless the schedule is interleaved)."""
    implementation = transformer_implementation(config, device)
    if config.train.enable_cuda_graph:
        _require_cuda_graph(config, implementation, device)
        # A graph records a stream of the program's own, and hooks of gradients run on the stream they were made on.
        torch.cuda.set_stream(torch.cuda.Stream())
    engine = transformer_config(config, device, implementation)
    if implementation == "fused" and config.layout.sequence_parallel and not config.layout.disable_tp_comm_overlap:
        peers.connect(parallel_state.get_tensor_model_parallel_group())
    stages = engine.virtual_pipeline_model_parallel_size
    chunks = [
        _wrap(_chunk(config, engine, implementation, padded_vocab_size, stage).to(device), config, engine, number)
        for number, stage in enumerate(range(stages) if stages else [None])]
    for chunk in chunks:
        chunk.broadcast_params()
        model = unwrap_model(chunk)
        if implementation == "fused":
            replace_instead_of_zeroing(chunk, model.accumulated_weights())
        if config.train.fp8_format is not None:
            model.fp8 = Fp8State(model.decoder.layers, config.train.fp8_recipe, device)
    return chunks


def transformer_implementation(config: RunConfig, device: torch.device) -> str:
    """Resolve --transformer-impl auto, and refuse what is not installed; say what was chosen and why."""
    wanted, on_cuda = config.model.transformer_impl, device.type == "cuda"
    transformer_engine = installed("transformer_engine")
    if wanted == "transformer_engine" and not (transformer_engine and on_cuda):
        reason = "CUDA is not present" if transformer_engine \
            else 'it is not installed (pip install "neo-pretrain[te]")'
        raise UserError(f"--transformer-impl transformer_engine: {reason}; use local or auto")
    if wanted == "auto":
        wanted, reason = _best_implementation(config, on_cuda, transformer_engine)
        logger.info("layers: %s (--transformer-impl auto: %s)", wanted, reason)
    if config.train.fp8_format is not None:
        _require_fp8(device)
    if wanted == "fused":
        _say_which_kernels(config, device)
        if on_cuda and missing_packages():
            logger.warning('faster with %s: pip install "neo-pretrain[gpu]"', ", ".join(missing_packages()))
    return wanted


def _say_which_kernels(config: RunConfig, device: torch.device) -> None:
    head_dim = config.model.head_dim
    kernels = kernels_for(device, _precision(config), head_dim, deterministic=config.train.deterministic_mode)
    logger.info("fused kernels: %s", kernels)
    if (kernels.attention == "flash-attn-4" and project_backward_is_for(device, head_dim)
            and installed_flash_attention() != CHANGED_FLASH_ATTENTION):
        logger.warning("attention's backward pass is faster with flash-attn-4 %s, on which the project's is built; "
                       "installed is %s", CHANGED_FLASH_ATTENTION, installed_flash_attention())


def _best_implementation(config: RunConfig, on_cuda: bool, transformer_engine: bool) -> tuple[str, str]:
    """The fastest layers that run here, and the reason."""
    if config.train.fp8_format is not None:
        return "fused", "fp8 is theirs"
    if not on_cuda:
        return "local", "there is no CUDA device"
    if config.model.attention_dropout or config.model.hidden_dropout:
        return "transformer_engine" if transformer_engine else "local", "fused layers have no dropout"
    if not missing_packages():
        return "fused", "its packages are installed"
    if transformer_engine:
        return "transformer_engine", f"{', '.join(missing_packages())} not installed"
    return "fused", "neither its packages nor Transformer Engine are installed; torch stands in for some kernels"


def _require_fp8(device: torch.device) -> None:
    """A CPU computes fp8's numbers in fp32, slowly: layouts can be tried there."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise UserError(f"--fp8-format: {torch.cuda.get_device_name(device)} has compute capability "
                        f"{'.'.join(map(str, capability))}, and fp8 needs 8.9 or later; leave the flag out")
    if not installed("triton"):
        raise UserError('--fp8-format: its kernels need triton, which is not installed (pip install triton)')


def _require_cuda_graph(config: RunConfig, implementation: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError("--enable-cuda-graph needs CUDA, which this machine lacks; leave it out")
    if implementation != "fused":
        raise UserError(f"--enable-cuda-graph: the layers are {implementation}, and only fused ones are recorded; "
                        "see the log for why, or leave it out")


def _fp8_layers(config: RunConfig) -> Callable[[int], bool]:
    """Which layers of the whole model, counted from 0, are in fp8."""
    train = config.train
    if train.fp8_format is None:
        return lambda layer: False
    first, last = (train.num_layers_at_start_in_bf16, train.num_layers_at_end_in_bf16) \
        if train.first_last_layers_bf16 else (0, 0)
    return lambda layer: first <= layer < config.model.num_layers - last


def _precision(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.bf16 else torch.float32


def transformer_config(config: RunConfig, device: torch.device,
                       implementation: str = "local") -> TransformerConfig:
    """megatron-core's description of this model, layout and precision, for layers of `implementation`."""
    with_te = implementation == "transformer_engine"
    model, layout, train = config.model, config.layout, config.train
    dtype = _precision(config)
    chunk = layout.num_layers_per_virtual_pipeline_stage
    stage_layers = model.num_layers // layout.pipeline_model_parallel_size
    kind = partial(FusedConfig, collectives_beside_products=_overlaps(layout)) if implementation == "fused" \
        else TransformerConfig
    return kind(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.kv_heads,
        kv_channels=model.head_dim, layernorm_epsilon=model.norm_epsilon, init_method_std=model.init_method_std,
        attention_dropout=model.attention_dropout, hidden_dropout=model.hidden_dropout,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # Fusions of the engine that need apex or a CUDA compiler of their own stay off: a run must not
        # depend on what happens to be installed. Transformer Engine brings the kernels of these:
        apply_rope_fusion=with_te, bias_dropout_fusion=with_te, cross_entropy_loss_fusion=with_te,
        cross_entropy_fusion_impl="te" if with_te else "native",
        bias_activation_fusion=device.type == "cuda", masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
        use_cpu_initialization=device.type == "cpu", params_dtype=dtype, pipeline_dtype=dtype, bf16=train.bf16,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=stage_layers // chunk if chunk else None,
        context_parallel_size=layout.context_parallel_size, sequence_parallel=layout.sequence_parallel,
        # Batched messages are told apart by their order alone: between two interleaved stages, each of which is
        # before and after the other, they would be confused.
        overlap_p2p_comm=chunk is not None, batch_p2p_comm=chunk is None,
        deterministic_mode=train.deterministic_mode, calculate_per_token_loss=train.calculate_per_token_loss,
        recompute_granularity=train.recompute_granularity, recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers, recompute_modules=list(train.recompute_modules))


def _overlaps(layout: LayoutConfig) -> bool:
    """Whether data-parallel ranks exchange gradients or weights while they compute."""
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return ranks > 1 and (layout.overlap_grad_reduce or layout.overlap_param_gather)


def _chunk(config: RunConfig, engine: TransformerConfig, implementation: str, padded_vocab_size: int,
           stage: int | None) -> torch.nn.Module:
    chunk = (FusedGPTModel if implementation == "fused" else GPTModel)(
        engine, _layer_spec(config, engine, implementation, stage), vocab_size=padded_vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope", rotary_base=config.model.rotary_base, vp_stage=stage)
    return Float16Module(engine, chunk) if config.train.bf16 else chunk


def _layer_spec(config: RunConfig, engine: TransformerConfig, implementation: str,
                stage: int | None) -> object:
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    if implementation == "fused":
        return layer_spec(engine, stage, _fp8_layers(config))
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    count = get_num_layers_to_build(engine, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _wrap(chunk: torch.nn.Module, config: RunConfig, engine: TransformerConfig,
          number: int) -> DistributedDataParallel:
    layout = config.layout
    return DistributedDataParallel(
        engine,
        DistributedDataParallelConfig(
            # Gradients are always summed in fp32: bf16 sums lose small micro-batches.
            grad_reduce_in_fp32=True, overlap_grad_reduce=layout.overlap_grad_reduce,
            # A pass over all gradients less; gloo cannot, and per-token losses are scaled at the end.
            average_in_collective=torch.cuda.is_available() and not config.train.calculate_per_token_loss,
            overlap_param_gather=layout.overlap_param_gather,
            use_distributed_optimizer=layout.use_distributed_optimizer),
        chunk,
        # Later chunks finish their backward pass first, with nothing left to overlap with.
        disable_bucketing=number > 0)
