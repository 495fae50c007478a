"""A run's arithmetic in a few lines, before it starts: size, batch, length, layout. Imports no torch."""

from __future__ import annotations


from megatron.pretrain.checks import data_parallel_size
from megatron.pretrain.config import RunConfig
from megatron.pretrain.model.flops import flops_per_token, padded_vocab_size, parameter_count
from megatron.pretrain.tokenizer import build_tokenizer


def plan_lines(config: RunConfig, world_size: int) -> list[str]:
    """Human-readable lines about the run of `world_size` processes."""
    model, layout, train, data = config.model, config.layout, config.train, config.data
    dp = data_parallel_size(config, world_size)
    vocab = build_tokenizer(config.tokenizer).vocab_size
    rows = padded_vocab_size(vocab, model.make_vocab_size_divisible_by, layout.tensor_model_parallel_size)
    tokens_a_step = train.global_batch_size * data.seq_length
    flops = flops_per_token(model, data.seq_length, rows)
    return [
        f"model      {parameter_count(model, rows):,} parameters: {model.num_layers} layers, hidden "
        f"{model.hidden_size}, ffn {model.ffn_hidden_size}, {model.num_attention_heads} heads, {model.kv_heads} "
        f"kv heads, head dim {model.head_dim}, vocabulary {vocab:,} in {rows:,} rows",
        f"layout     {world_size} processes = TP {layout.tensor_model_parallel_size} x PP "
        f"{layout.pipeline_model_parallel_size} x CP {layout.context_parallel_size} x DP {dp}"
        + (", sequence parallel" if layout.sequence_parallel else "")
        + (", distributed optimizer" if layout.use_distributed_optimizer else ""),
        f"batch      {train.global_batch_size:,} samples = micro-batch {train.micro_batch_size} x DP {dp} x "
        f"{train.global_batch_size // (train.micro_batch_size * dp)} accumulated",
        f"step       {tokens_a_step:,} tokens = {train.global_batch_size:,} samples x {data.seq_length:,}; "
        f"{flops * tokens_a_step / 1e12:,.1f} TFLOP",
        f"length     {train.train_iters:,} iterations, {train.train_iters * tokens_a_step:,} tokens"
        + (f"; leaves at multiples of {train.exit_interval:,}" if train.exit_interval else ""),
        f"precision  {'bf16, fp32 master weights and gradients' if train.bf16 else 'fp32'}"
        + (f"; products in fp8 ({train.fp8_format}, {train.fp8_recipe})" if train.fp8_format else ""),
    ]
