"""The rules between settings, each with the sentence that a user reads."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.pretrain.checks import RANGES, data_parallel_size, settle
from megatron.pretrain.cli import parse
from megatron.pretrain.config import SECTIONS, RunConfig
from megatron.pretrain.errors import UserError

# 12 layers, 12 heads of 8: many sizes divide it.
SHAPE = ("--num-layers 12 --hidden-size 96 --ffn-hidden-size 240 --num-attention-heads 12 --seq-length 48 "
         "--micro-batch-size 2 --train-iters 100 --lr 1e-3").split()
INTERLEAVED = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage"
FULL = "--recompute-granularity full --recompute-num-layers"


def settled(flags: str = "", world_size: int = 1) -> RunConfig:
    return settle(parse([*SHAPE, *flags.split()]).config, world_size)


def mistake(flags: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        settled(flags, world_size)
    return str(caught.value)


@pytest.mark.parametrize("world_size, flags, expected", [
    (1, "", 1), (8, "", 8), (8, "--tensor-model-parallel-size 2", 4),
    (24, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3", 4),
])
def test_data_parallel_size_is_what_the_model_leaves(world_size, flags, expected):
    assert data_parallel_size(parse([*SHAPE, *flags.split()]).config, world_size) == expected


def test_global_batch_defaults_to_one_micro_batch_a_rank():
    assert settled(world_size=8).train.global_batch_size == 16
    assert settled("--tensor-model-parallel-size 2", world_size=8).train.global_batch_size == 8
    assert settled("--global-batch-size 32", world_size=8).train.global_batch_size == 32


@pytest.mark.parametrize("world_size, flags", [
    (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    (2, "--group-query-attention --num-query-groups 1 --tensor-model-parallel-size 2"),
    (6, "--group-query-attention --num-query-groups 3 --tensor-model-parallel-size 6"),
    (2, f"{INTERLEAVED} 3 --global-batch-size 8"),
    (1, f"{FULL} 4 --recompute-method uniform"),
    (1, f"{FULL} 5 --recompute-method block"),
    (1, "--recompute-granularity selective"),
    (1, "--max-position-embeddings 24"),  # CT-LLM-2B trains on twice the context that it declares
    (4, "--context-parallel-size 2 --transformer-impl transformer_engine"),
    (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    (1, "--lr-decay-style wsd --wsd_decay_ratio 0.1 --wsd_half_life -1 --lr_stable_steps 0"),
    (1, "--lr-warmup-iters 99"),
    (1, "--save out --save-interval 5"),
    (1, "--kv-channels 10"),
    (1, "--clip-grad 0 --weight-decay 0 --eval-iters 0 --num-workers 0 --adam-beta1 0"),
])
def test_what_can_run_is_left_as_it_is(world_size, flags):
    assert settled(flags, world_size).model == parse([*SHAPE, *flags.split()]).config.model


@pytest.mark.parametrize("world_size, flags, sentence", [
    (3, "--tensor-model-parallel-size 2", "3 processes cannot be shared out: TP 2 x PP 1 x CP 1 = 2 must "
     "divide them; start a multiple of 2 processes or lower a parallel size"),
    (6, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
     "6 processes cannot be shared out: TP 2 x PP 2 x CP 1 = 4 must divide them"),
    (1, "--global-batch-size 7", "--global-batch-size 7 is not a multiple of micro-batch 2 x data-parallel "
     "size 1 = 2; the nearest that is: 8"),
    (8, "--global-batch-size 3", "--global-batch-size 3 is not a multiple of micro-batch 2 x data-parallel "
     "size 8 = 16; the nearest that is: 16"),
    (5, "--tensor-model-parallel-size 5",
     "--num-attention-heads 12 is not a multiple of --tensor-model-parallel-size 5"),
    (2, "--tensor-model-parallel-size 2 --ffn-hidden-size 241",
     "--ffn-hidden-size 241 is not a multiple of --tensor-model-parallel-size 2"),
    (1, "--group-query-attention --num-query-groups 5",
     "--num-attention-heads 12 is not a multiple of --num-query-groups 5"),
    (2, "--group-query-attention --num-query-groups 3 --tensor-model-parallel-size 2",
     "--num-query-groups 3 neither divides --tensor-model-parallel-size 2 nor is a multiple of it"),
    (1, "--num-query-groups 3", "--num-query-groups 3 needs --group-query-attention"),
    (1, "--kv-channels 7", "--kv-channels 7: rotary embedding needs an even number"),
    (1, "--sequence-parallel", "--sequence-parallel needs --tensor-model-parallel-size above 1"),
    (4, "--sequence-parallel --tensor-model-parallel-size 4 --seq-length 50",
     "--sequence-parallel: --seq-length 50 is not a multiple of 4"),
    (5, "--pipeline-model-parallel-size 5",
     "--num-layers 12 is not a multiple of --pipeline-model-parallel-size 5"),
    (1, "--num-layers-per-virtual-pipeline-stage 2",
     "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1"),
    (2, f"{INTERLEAVED} 4 --global-batch-size 8",
     "--num-layers-per-virtual-pipeline-stage 4 must divide the 6 layers of a stage, and be less"),
    (2, f"{INTERLEAVED} 6 --global-batch-size 8", "--num-layers-per-virtual-pipeline-stage 6 must divide"),
    (2, f"{INTERLEAVED} 2 --global-batch-size 6", "--num-layers-per-virtual-pipeline-stage: the interleaved "
     "schedule needs micro-batches (3 a step) in a multiple of --pipeline-model-parallel-size 2"),
    (2, "--context-parallel-size 2", "--context-parallel-size 2 needs --transformer-impl transformer_engine: "
     "torch's attention cannot share a sequence"),
    (2, "--context-parallel-size 2 --transformer-impl transformer_engine --seq-length 50",
     "--seq-length 50 is not a multiple of 2 x --context-parallel-size 2"),
    (1, "--overlap-grad-reduce --overlap-param-gather",
     "--overlap-param-gather needs --use-distributed-optimizer"),
    (1, "--use-distributed-optimizer --overlap-param-gather",
     "--overlap-param-gather needs --overlap-grad-reduce"),
    (1, "--recompute-granularity full", "--recompute-method and --recompute-num-layers go with "
     "--recompute-granularity full, and it needs both"),
    (1, "--recompute-modules mlp", "--recompute-modules goes with --recompute-granularity selective"),
    (1, "--recompute-granularity selective --recompute-modules mlp moe",
     "--recompute-modules moe: must be core_attn or mlp"),
    (1, "--transformer-impl fused --hidden-dropout 0.1", "--transformer-impl fused has no dropout"),
    (1, "--first-last-layers-bf16", "--first-last-layers-bf16 needs --fp8-format hybrid (--fp8)"),
    (1, "--fp8", "--fp8-format hybrid needs --bf16"),
    (1, "--fp8 --bf16 --transformer-impl local",
     "--fp8-format hybrid: --transformer-impl local has no fp8 here; use fused or auto"),
    (1, "--fp8 --bf16 --attention-dropout 0.1", "--fp8-format hybrid: the fused layers have no dropout"),
    (1, "--fp8 --bf16 --hidden-size 120 --kv-channels 16",
     "--fp8-format hybrid: --hidden-size is 120, and fp8 products take multiples of 16"),
    (2, "--fp8 --bf16 --tensor-model-parallel-size 2",
     "--fp8-format hybrid: --ffn-hidden-size / --tensor-model-parallel-size is 120"),
    (1, "--fp8 --bf16 --micro-batch-size 1 --seq-length 40",
     "--fp8-format hybrid: --micro-batch-size x --seq-length is 40"),
    (1, "--recompute-method uniform", "--recompute-method and --recompute-num-layers go with"),
    (1, "--recompute-granularity selective --recompute-num-layers 1",
     "--recompute-method and --recompute-num-layers go with"),
    (1, f"{FULL} 5 --recompute-method uniform",
     "--recompute-num-layers 5 must divide the 12 layers that a rank holds in one piece"),
    (2, f"{INTERLEAVED} 3 --global-batch-size 8 {FULL} 2 --recompute-method uniform",
     "--recompute-num-layers 2 must divide the 3 layers that a rank holds in one piece"),
    (1, f"{FULL} 1 --recompute-method uniform --recompute-activations",
     "--recompute-activations means --recompute-granularity selective, and full is given: leave one out"),
    (1, "--lr-warmup-iters 100", "--lr-warmup-iters 100 must be below the 100 iterations of the schedule "
     "(--lr-decay-iters, or --train-iters)"),
    (1, "--lr-warmup-iters 50 --lr-decay-iters 40", "--lr-warmup-iters 50 must be below the 40 iterations"),
    (1, "--min-lr 2e-3", "--min-lr 0.002 must lie between 0 and --lr 0.001"),
    (1, "--lr-warmup-init 1", "--lr-warmup-init 1.0 must lie between 0 and --lr 0.001"),
    (1, "--lr-decay-style wsd --wsd_decay_ratio 0", "--wsd_decay_ratio 0.0: must be above 0 and at most 1"),
    (1, "--lr-decay-style wsd --lr_stable_steps 999",
     "--lr_stable_steps 999: must be from 0 to the 200 samples"),
    (1, "--save-interval 5", "--save-interval needs --save, the folder to save to"),
    (1, "--finetune", "--finetune needs --load, the checkpoint whose weights to start from"),
])
def test_rule_is_told_in_one_sentence(world_size, flags, sentence):
    assert mistake(flags, world_size).startswith(sentence)


@pytest.mark.parametrize("flags, sentence", [
    ("--num-layers 0", "--num-layers 0: must be 1 or more"),
    ("--num-attention-heads 0", "--num-attention-heads 0: must be 1 or more"),
    ("--num-attention-heads -4", "--num-attention-heads -4: must be 1 or more"),
    ("--group-query-attention --num-query-groups 0", "--num-query-groups 0: must be 1 or more"),
    ("--kv-channels 0", "--kv-channels 0: must be 1 or more"),
    ("--micro-batch-size 0", "--micro-batch-size 0: must be 1 or more"),
    ("--global-batch-size -2", "--global-batch-size -2: must be 1 or more"),
    ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: must be 1 or more"),
    ("--context-parallel-size -1", "--context-parallel-size -1: must be 1 or more"),
    ("--num-layers-per-virtual-pipeline-stage 0",
     "--num-layers-per-virtual-pipeline-stage 0: must be 1 or more"),
    ("--recompute-num-layers 0", "--recompute-num-layers 0: must be 1 or more"),
    ("--train-iters 0", "--train-iters 0: must be 1 or more"),
    ("--lr-decay-iters 0", "--lr-decay-iters 0: must be 1 or more"),
    ("--save-interval 0", "--save-interval 0: must be 1 or more"),
    ("--log-interval 0", "--log-interval 0: must be 1 or more"),
    ("--eval-interval 0", "--eval-interval 0: must be 1 or more"),
    ("--distributed-timeout-minutes 0", "--distributed-timeout-minutes 0: must be 1 or more"),
    ("--eval-iters -1", "--eval-iters -1: must be 0 or more"),
    ("--num-layers-at-start-in-bf16 -1", "--num-layers-at-start-in-bf16 -1: must be 0 or more"),
    ("--num-workers -1", "--num-workers -1: must be 0 or more"),
    ("--clip-grad -1", "--clip-grad -1.0: must be 0 or more"),
    ("--weight-decay -0.1", "--weight-decay -0.1: must be 0 or more"),
    ("--lr-warmup-iters -1", "--lr-warmup-iters -1: must be 0 or more"),
    ("--lr 0", "--lr 0.0: must be above 0"),
    ("--adam-eps 0", "--adam-eps 0.0: must be above 0"),
    ("--init-method-std 0", "--init-method-std 0.0: must be above 0"),
    ("--norm-epsilon 0", "--norm-epsilon 0.0: must be above 0"),
    ("--exit-duration-in-mins 0", "--exit-duration-in-mins 0.0: must be above 0"),
    ("--adam-beta1 1", "--adam-beta1 1.0: must be at least 0 and below 1"),
    ("--adam-beta2 -0.1", "--adam-beta2 -0.1: must be at least 0 and below 1"),
    ("--hidden-dropout 1", "--hidden-dropout 1.0: must be at least 0 and below 1"),
    ("--attention-dropout -0.5", "--attention-dropout -0.5: must be at least 0 and below 1"),
    ("--seed -1", "--seed -1: must be at least 0 and below 2147483648"),
    ("--seed 4294967296", "--seed 4294967296: must be at least 0 and below 2147483648"),
])
def test_number_that_makes_no_sense_is_refused(flags, sentence):
    assert mistake(flags) == sentence


def test_every_number_has_a_range():
    ranged = [(section, name) for _, _, sections in RANGES for section, names in sections.items()
              for name in names]
    elsewhere = {"wsd_decay_ratio", "wsd_half_life", "lr_stable_steps"}  # optim.schedule judges them
    numbers = [(section, field.name) for section, kind in SECTIONS.items()
               for field in dataclasses.fields(kind)
               if str(field.type).removesuffix(" | None") in ("int", "float")
               and not field.metadata["choices"] and field.name not in elsewhere]
    assert sorted(ranged) == sorted(numbers)
