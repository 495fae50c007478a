"""--dry-run: the arithmetic of a run before it starts, which needs no torch and creates nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.plan import plan_lines

NEO = "--swiglu --normalization RMSNorm --untie-embeddings-and-output-weights --group-query-attention --bf16 "
MODELS = {
    "NEO-7B": "--num-layers 28 --hidden-size 3072 --ffn-hidden-size 24576 --num-attention-heads 16 "
              "--num-query-groups 16 --seq-length 8192",
    "NEO-2B": "--num-layers 18 --hidden-size 2048 --ffn-hidden-size 16384 --num-attention-heads 8 "
              "--num-query-groups 1 --seq-length 8192",
    "CT-LLM-2B": "--num-layers 32 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 "
                 "--num-query-groups 16 --seq-length 8192 --max-position-embeddings 4096",
}
RUN = "--micro-batch-size 1 --train-iters 6000 --lr 2e-4 --tokenizer-type NullTokenizer --vocab-size"


def plan(model: str, vocab_size: int, flags: str = "", world_size: int = 1) -> dict[str, str]:
    """The plan's lines by their first word."""
    argv = f"{NEO} {MODELS[model]} {RUN} {vocab_size} {flags}".split()
    lines = plan_lines(settle(parse(argv).config, world_size), world_size)
    return {line.split()[0]: line.partition(" ")[2].strip() for line in lines}


# NEO's counts are those of its published checkpoints. CT-LLM-2B, with the rows of Baichuan's 125,696 ids:
# 32 x (4 x 2048^2 + 3 x 2048 x 5504 + 2 x 2048) + 2048 + 2 x 125696 x 2048.
@pytest.mark.parametrize("model, vocab_size, parameters", [
    ("NEO-7B", 64000, 7_792_143_360), ("NEO-7B", 64256, 7_793_716_224),
    ("NEO-2B", 64000, 2_244_028_416), ("NEO-2B", 64256, 2_245_076_992),
    ("CT-LLM-2B", 125_696, 2_133_985_280),
])
def test_parameters_to_the_last_digit(model, vocab_size, parameters):
    assert plan(model, vocab_size)["model"].startswith(f"{parameters:,} parameters: ")


def test_vocabulary_is_padded_for_tensor_parallel_ranks():
    assert plan("NEO-2B", 64005)["model"].endswith("vocabulary 64,005 in 64,128 rows")
    padded = plan("NEO-7B", 64005, "--tensor-model-parallel-size 2", world_size=2)["model"]
    assert padded.endswith("head dim 192, vocabulary 64,005 in 64,256 rows")


def test_batch_step_and_length_follow_from_the_layout():
    said = plan("NEO-7B", 64000, "--tensor-model-parallel-size 2 --sequence-parallel "
                "--use-distributed-optimizer --global-batch-size 1024 --exit-interval 2000", world_size=64)
    assert said["layout"] == ("64 processes = TP 2 x PP 1 x CP 1 x DP 32, sequence parallel, distributed "
                              "optimizer")
    assert said["batch"] == "1,024 samples = micro-batch 1 x DP 32 x 32 accumulated"
    assert said["step"].startswith("8,388,608 tokens = 1,024 samples x 8,192; ")
    assert said["length"] == "6,000 iterations, 50,331,648,000 tokens; leaves at multiples of 2,000"
    assert said["precision"] == "bf16, fp32 master weights and gradients"


def test_work_of_a_step_is_six_flops_a_weight_and_causal_attention():
    # 6 x (weights that multiply a token: all but the embedding and the norms) + attention's causal half.
    matrices = 7_792_143_360 - 64000 * 3072 - 57 * 3072
    attention = 28 * 8192 * 16 * 192
    tflop = 6 * (matrices + attention) * 8192 / 1e12
    assert plan("NEO-7B", 64000)["step"].endswith(f"; {tflop:,.1f} TFLOP")


def test_dry_run_imports_no_torch_and_creates_nothing(tmp_path: Path, run_tool):
    argv = f"{NEO} {MODELS['NEO-2B']} {RUN} 64000 --dry-run --save out/checkpoint --data-path nowhere".split()
    script = ("import sys\nfrom megatron.pretrain.main import main\n"
              f"code = main({argv!r})\n"
              "assert not {'torch', 'megatron.core'} & set(sys.modules), 'a dry run loads the engine'\n"
              "sys.exit(code)")
    said = run_tool("-c", script, cwd=tmp_path, env={"WORLD_SIZE": "8", "RANK": "0"})
    assert (said.returncode, said.stderr) == (0, "")
    assert "2,244,028,416 parameters" in said.stdout
    assert "8 processes = TP 1 x PP 1 x CP 1 x DP 8" in said.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world_size", ["none", "0", "-1"])
def test_world_size_of_the_environment_must_be_a_number(world_size: str, run_tool):
    said = run_tool("pretrain_gpt.py", *f"{NEO} {MODELS['NEO-2B']} {RUN} 64000 --dry-run".split(),
                    env={"WORLD_SIZE": world_size})
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == (f"error: WORLD_SIZE='{world_size}' in the environment: must be the number of "
                           "processes\n")


def test_first_process_of_a_machine_tells_what_is_wrong_and_others_wait_for_it(repository: Path):
    command = [sys.executable, repository / "pretrain_gpt.py", "--num-layer", "2"]
    second_machine = [{"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"},
                      {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **place})
                 for place in second_machine]
    _, sentence = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 2
    assert sentence == "error: unknown flag --num-layer; the nearest known one is --num-layers\n"
    # torchrun ends the others as soon as one has failed.
    assert processes[1].poll() is None
    processes[1].terminate()
    assert processes[1].communicate(timeout=60)[1] == ""
