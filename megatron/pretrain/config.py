"""What a run is: frozen dataclasses, one a concern, whose fields are also the command line's flags.

`cli.py` turns every field into a flag of the same name with dashes (Megatron-LM's names), so a field's
help text is written once, here. `checks.py` holds the rules between fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron.pretrain.setting import setting
from megatron.pretrain.tokenizer_config import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a NEO model: pre-norm decoder, RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases."""

    num_layers: int = setting(None, "Transformer layers.")
    hidden_size: int = setting(None, "Width of the residual stream.")
    ffn_hidden_size: int = setting(None, "Width of the gated MLP (each of gate and up).")
    num_attention_heads: int = setting(None, "Query heads.")
    group_query_attention: bool = setting(False, "Share key/value heads between query heads.")
    num_query_groups: int | None = setting(
        None, "Key/value heads; with --group-query-attention. Otherwise one for each query head.")
    kv_channels: int | None = setting(None, "Head dimension; hidden size / heads unless given.")
    max_position_embeddings: int = setting(
        None, "Longest context the model declares; --seq-length unless given.")
    norm_epsilon: float = setting(1e-5, "Epsilon of RMSNorm.")
    rotary_base: float = setting(10000.0, "Base of the rotary position embedding.")
    untie_embeddings_and_output_weights: bool = setting(
        False, "Give the output layer weights of its own (every NEO model does).")
    init_method_std: float = setting(0.02, "Standard deviation of the normal initialisation.")
    attention_dropout: float = setting(0.0, "Dropout on attention probabilities.")
    hidden_dropout: float = setting(0.0, "Dropout on the residual branches.")
    make_vocab_size_divisible_by: int = setting(
        128, "Pad the vocabulary to a multiple of this times the tensor-parallel size.")
    transformer_impl: str = setting(
        "auto", "Layers to build from: fused (flash-attn-4, quack and Triton kernels), transformer_engine, local "
        "(torch alone), or auto: on CUDA the fastest whose packages are installed, elsewhere local.",
        choices=("auto", "fused", "local", "transformer_engine"))

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the model and the batch are cut over processes."""

    tensor_model_parallel_size: int = setting(1, "Ranks that share each layer's matrices (TP).")
    pipeline_model_parallel_size: int = setting(1, "Stages that share the layers (PP).")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "Layers a model chunk: with it the pipeline schedule is interleaved.")
    context_parallel_size: int = setting(
        1, "Ranks that share each sequence (CP); needs --transformer-impl transformer_engine.")
    expert_model_parallel_size: int = setting(1, "Only 1: NEO models are dense.", choices=(1,))
    sequence_parallel: bool = setting(
        False, "Split activations between the matrices along the sequence too (needs TP > 1).")
    use_distributed_optimizer: bool = setting(
        False, "Shard the optimizer's state over the data-parallel ranks.")
    overlap_grad_reduce: bool = setting(False, "Reduce gradients while the backward pass still runs.")
    overlap_param_gather: bool = setting(
        False, "Gather updated parameters during the next forward pass (distributed optimizer only).")
    disable_tp_comm_overlap: bool = setting(
        False, "Fused layers: NCCL alone for tensor parallelism, where GPUs of one machine else fetch from each "
        "other's memory beside their products.")
    distributed_backend: str = setting(
        "auto", "nccl for GPUs, gloo for CPUs; auto takes what the machine has.",
        choices=("auto", "nccl", "gloo"))
    distributed_timeout_minutes: int = setting(10, "How long a collective may take before the run fails.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are seen, and in which order."""

    data_path: tuple[str, ...] = setting(
        (), "One dataset prefix, several, or pairs of weight and prefix; plain or base64.",
        aliases=("--train-data-path",))
    data_args_path: str | None = setting(
        None, "A file with the content of --data-path, for mixtures longer than a command line.")
    data_weights: str = setting(
        "relative", "What the weights of --data-path are: relative shares of an endless stream, or tokens "
        "to train on, as gen_mixture_str.sh writes them: then no source runs past its rounds.",
        choices=("relative", "tokens"))
    split: str = setting("1000,0,0", "Documents for training, validation and test, as proportions.")
    seq_length: int = setting(None, "Tokens a sample.")
    enable_shuffle: bool = setting(
        False, "Shuffle each source's documents. Samples are always shuffled with the seed.")
    eod_mask_loss: bool = setting(False, "No loss where the input token is the end of a document.")
    num_workers: int = setting(
        2, "Threads that read batches ahead; 0 reads them in the training loop.")
    data_cache_path: str | None = setting(
        None, "Accepted for Megatron-LM's sake: the sample order is computed, not stored.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = setting(None, "Highest learning rate.")
    min_lr: float = setting(0.0, "Lowest learning rate.")
    lr_decay_style: str = setting(
        "cosine", "Shape of the decay.", choices=("cosine", "wsd", "linear", "constant"))
    lr_decay_iters: int | None = setting(None, "Iterations to decay over; --train-iters unless given.")
    lr_warmup_iters: int = setting(0, "Iterations of linear warm-up.")
    lr_warmup_init: float = setting(0.0, "Learning rate the warm-up starts from.")
    wsd_decay_ratio: float = setting(
        0.1, "wsd: length of the decay in proportion to the stable part.")
    wsd_half_life: int = setting(
        -1, "wsd: samples in which the rate halves; -1 derives it from the decay's length.")
    lr_stable_steps: int = setting(
        -1, "wsd: samples at the highest rate; -1 derives them from --wsd_decay_ratio, -2 never decays.")
    weight_decay: float = setting(0.01, "Decoupled weight decay; none on norms.")
    adam_beta1: float = setting(0.9, "Adam's first decay rate.")
    adam_beta2: float = setting(0.95, "Adam's second decay rate.")
    adam_eps: float = setting(1e-8, "Adam's epsilon.")
    clip_grad: float = setting(1.0, "Clip gradients to this global norm; 0 does not clip.")
    optimizer: str = setting("adam", "Only adam.", choices=("adam",))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, precision and length of a run."""

    micro_batch_size: int = setting(None, "Samples a forward pass, on each data-parallel rank.")
    global_batch_size: int | None = setting(
        None, "Samples an optimizer step; micro-batch x data-parallel size unless given.")
    train_iters: int = setting(None, "Optimizer steps of the whole run.")
    exit_interval: int | None = setting(
        None, "Save and stop after an iteration divisible by this.")
    exit_duration_in_mins: float | None = setting(None, "Save and stop after this many minutes.")
    seed: int = setting(1234, "Seed of initialisation, dropout and sample order.")
    bf16: bool = setting(False, "Compute in bfloat16, with float32 master weights; float32 otherwise.")
    fp8: bool = setting(False, "Short for --fp8-format hybrid.")
    fp8_format: str | None = setting(
        None, "The layers' matrix products in fp8, on Hopper or later: hybrid is e4m3 forward, e5m2 for "
        "gradients. Attention, norms, the embedding and the output layer stay in bf16. Needs --bf16.",
        choices=("hybrid",))
    fp8_recipe: str = setting(
        "delayed", "What a tensor is scaled by: tensorwise, its own largest value, or delayed, the largest of "
        "the past 1024 steps, which reads it once instead of twice.", choices=("delayed", "tensorwise"))
    first_last_layers_bf16: bool = setting(False, "With fp8: keep the first and the last layers in bf16.")
    num_layers_at_start_in_bf16: int = setting(1, "With --first-last-layers-bf16: how many first layers.")
    num_layers_at_end_in_bf16: int = setting(1, "With --first-last-layers-bf16: how many last layers.")
    enable_cuda_graph: bool = setting(
        False, "Replay forward and backward of a micro-batch as a CUDA graph: where the GPU waits for the host "
        "(fp8, small models). Fused layers, without pipeline parallelism, overlap of data-parallel communication and "
        "full recompute.")
    calculate_per_token_loss: bool = setting(
        False, "Average the loss over the global batch's tokens, rather than over its micro-batches.")
    recompute_granularity: str | None = setting(
        None, "Activations to recompute in the backward pass.", choices=("full", "selective"))
    recompute_method: str | None = setting(
        None, "With full: uniform or block.", choices=("uniform", "block"))
    recompute_num_layers: int | None = setting(None, "With full: layers a recomputed unit.")
    recompute_modules: tuple[str, ...] = setting(
        ("core_attn",), "With selective: core_attn (the scores, which fused kernels never keep) and mlp (what it "
        "holds before its activation, the largest of all; fused and transformer_engine).")
    recompute_activations: bool = setting(False, "Short for --recompute-granularity selective.")
    eval_iters: int = setting(0, "Global batches of each evaluation on the validation split.")
    eval_interval: int = setting(1000, "Iterations between evaluations.")
    deterministic_mode: bool = setting(False, "Only deterministic kernels.")
    max_skipped_iterations: int = setting(
        20, "Stop after this many iterations in a row with a gradient that is not finite.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and what a run starts from."""

    save: str | None = setting(None, "Folder to save checkpoints to.")
    save_interval: int | None = setting(None, "Iterations between checkpoints.")
    load: str | None = setting(None, "Folder of checkpoints (or one iteration's folder) to start from.")
    finetune: bool = setting(
        False, "Load the weights alone: the optimizer, the schedule and the data start anew.")
    no_load_optim: bool = setting(False, "Do not load the optimizer's state.")
    no_load_rng: bool = setting(False, "Do not load the states of the random generators.")
    override_opt_param_scheduler: bool = setting(
        False, "On resume take the schedule from the flags although the checkpoint's differs.")
    override_data: bool = setting(False, "On resume go on although the mixture's hash differs.")
    ckpt_format: str = setting("torch_dist", "Only torch_dist.", choices=("torch_dist",))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the figures of a run go."""

    log_interval: int = setting(100, "Iterations between log lines.")
    log_dir: str | None = setting(
        None, "Folder of metrics.jsonl; the parent of --save unless given.")
    tensorboard_dir: str | None = setting(None, "Folder of TensorBoard's event files.")
    wandb_project: str | None = setting(None, "Project on Weights & Biases.")
    wandb_exp_name: str | None = setting(None, "Name of the run on Weights & Biases.")
    wandb_save_dir: str | None = setting(None, "Folder of Weights & Biases' files.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of."""

    model: ModelConfig
    layout: LayoutConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as nested plain values, ready for JSON."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {
    "model": ModelConfig, "layout": LayoutConfig, "tokenizer": TokenizerConfig, "data": DataConfig,
    "optim": OptimConfig, "train": TrainConfig, "checkpoint": CheckpointConfig, "log": LogConfig}


def from_dict(saved: dict[str, Any]) -> RunConfig:
    """The configuration that `as_dict` gave; entries that are no settings are left out."""
    sections = {}
    for name, kind in SECTIONS.items():
        known = {field.name for field in dataclasses.fields(kind)}
        values = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in saved[name].items() if key in known}
        sections[name] = kind(**values)
    return RunConfig(**sections)
