"""The launchers, run as a user runs them; what they start is a script that prints what it was given."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.indexed import IndexedWriter
from megatron.pretrain.data.mixture import load_mixture
from megatron.pretrain.data.mixture_env import write_mixture_env

LAUNCHERS = ("pretrain_7b", "pretrain_7b_phase2", "pretrain_2b", "pretrain_2b_ctllm")
SHAPES = {  # layers, hidden, ffn, heads, kv heads, declared context, TP: DESIGN's table of NEO's models
    "pretrain_7b": (28, 3072, 24576, 16, 16, 8192, 2),
    "pretrain_7b_phase2": (28, 3072, 24576, 16, 16, 8192, 2),
    "pretrain_2b": (18, 2048, 16384, 8, 1, 8192, 1),
    "pretrain_2b_ctllm": (32, 2048, 5504, 16, 16, 4096, 1),
}
# Long lines that several processes print to one pipe may run into each other: each prints a file's name
# in one write.
SHOW_ARGUMENTS = """
import json, os, sys
seen = f"{__file__}.{os.getpid()}"
with open(seen, "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
os.write(1, f"ARGV {seen}\\n".encode())
"""


@dataclass(frozen=True)
class Said:
    """What a launcher said: its command, and what the script it started was given."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def command(self) -> list[str]:
        """The words of the torchrun command, as a shell reads the printed line."""
        lines = self.stdout.splitlines()
        return shlex.split(lines[lines.index("-" * 52) + 1])

    @property
    def processes(self) -> list[tuple[list[str], dict[str, str]]]:
        """Arguments and environment of every process that ran the script."""
        return [tuple(json.loads(Path(name).read_text())) for name in re.findall(r"ARGV (\S+)", self.stdout)]

    def flag(self, name: str) -> str | None:
        """The value of a flag in the command; None where it is not given."""
        return self.command[self.command.index(name) + 1] if name in self.command else None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the launchers are started: a folder with one dataset, `corpus`, of 1,000 tokens."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "corpus", 1000)
    return tmp_path


@pytest.fixture
def launch(here: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path, tiny_tokenizer: Path):
    """`launch("pretrain_2b", "--dry-run", SEED=7)`: run it in `here`, on a machine with `gpus` GPUs."""
    elsewhere = tmp_path_factory.mktemp("machine")
    script = elsewhere / "show_arguments.py"
    script.write_text(SHOW_ARGUMENTS)

    def run(name: str, *arguments: str, gpus: int = 0, **variables: object) -> Said:
        smi = elsewhere / "nvidia-smi"
        listed = "".join(f"echo 'GPU {n}: NVIDIA H200 (UUID: GPU-{n})'\n" for n in range(gpus))
        smi.write_text("#!/bin/sh\n" + listed)
        smi.chmod(0o755)
        env = {"PATH": f"{elsewhere}:{os.environ['PATH']}", "PYTHON": sys.executable, "HOME": str(here),
               "PY_SCRIPT_PATH": str(script), "TOKENIZER_MODEL_PATH": str(tiny_tokenizer),
               **{key: str(value) for key, value in variables.items()}}
        ran = subprocess.run(["bash", repository / f"neo/scripts/{name}.sh", *arguments], cwd=here, env=env,
                             text=True, capture_output=True, timeout=300)
        return Said(ran.returncode, ran.stdout, ran.stderr)

    return run


def write_dataset(prefix: Path, tokens: int) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.zeros(tokens, np.uint16), [tokens])


def write_mixture(here: Path, entries: int = 1) -> None:
    """A mixture.env of 8 samples of 10 tokens a step; each entry reads the 1,000 tokens of `corpus` twice."""
    (here / "mixture.yml").write_text(
        "GLOBAL_BATCH_SIZE: 8\nSEQ_LEN: 10\n2_ROUND:\n" + "  - corpus.bin\n" * entries, encoding="utf-8")
    write_mixture_env(load_mixture(here / "mixture.yml"), here / "mixture.env")


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# --- what every launcher does ------------------------------------------------------------------------


def test_every_script_parses(repository: Path):
    scripts = sorted((repository / "neo/scripts").glob("*.sh"))
    assert len(scripts) >= 6
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name, parameters", [
    ("pretrain_7b", "7,792,143,360"),
    ("pretrain_7b_phase2", "7,792,143,360"),
    ("pretrain_2b", "2,244,028,416"),
    # 2 x 64000 x 2048 + 32 x (4 x 2048 x 2048 + 3 x 2048 x 5504 + 2 x 2048) + 2048
    ("pretrain_2b_ctllm", "1,881,278,464")])
def test_a_dry_run_plans_and_creates_nothing(launch, here, name, parameters):
    before = files_under(here)
    said = launch(name, "--dry-run", PY_SCRIPT_PATH="", TOKENIZER_MODEL_PATH="",
                  LOAD_CHECKPOINT_PATH="not-there", DATA_PATH="not-there")
    assert said.returncode == 0, said.stderr
    assert f"{parameters} parameters" in said.stdout
    assert "4 processes" in said.stdout
    assert f"{int(said.flag('--global-batch-size')) * 8192:,} tokens" in said.stdout
    assert f"{int(said.flag('--train-iters')):,} iterations" in said.stdout
    assert "warning: DATA_PATH names 1 dataset(s) that are not here, first not-there" in said.stderr
    assert "warning: LOAD_CHECKPOINT_PATH=not-there: no checkpoint there" in said.stderr
    assert files_under(here) == before


def test_the_published_vocabulary_gives_the_published_size(launch):
    said = launch("pretrain_7b", "--dry-run", "--", "--tokenizer-sentencepiece-legacy", PY_SCRIPT_PATH="",
                  TOKENIZER_MODEL_PATH="", DATA_PATH="corpus")
    assert "7,793,716,224 parameters" in said.stdout, said.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_shape_and_command(launch, name):
    said = launch(name, "--dry-run", DATA_PATH="corpus")
    flags = ("--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads",
             "--num-query-groups", "--max-position-embeddings", "--tensor-model-parallel-size")
    assert tuple(int(said.flag(flag)) for flag in flags) == SHAPES[name]
    assert said.flag("--kv-channels") is None
    assert ("--sequence-parallel" in said.command) == (SHAPES[name][-1] > 1)
    assert said.flag("--train-iters") == ("6000" if "7b" in name else "600400")
    # What is printed is what runs, but for the flag that makes it a plan.
    [(arguments, environment)] = said.processes
    script = said.command.index(environment["PY_SCRIPT_PATH"])
    assert arguments == [*said.command[script + 1:], "--dry-run"]
    assert environment["WORLD_SIZE"] == "4"
    assert "torchrun" in said.command[script - 11]


def test_the_command_can_be_pasted(launch, here):
    said = launch("pretrain_2b", "--dry-run", "--", "--wandb-exp-name", "it's $HOME; a b", DATA_PATH="corpus",
                  OUTPUT_HOME="my run")
    [(arguments, _)] = said.processes
    assert arguments[-3:] == ["--wandb-exp-name", "it's $HOME; a b", "--dry-run"]
    assert said.flag("--save") == "my run/checkpoint"
    line = next(line for line in said.stdout.splitlines() if line.startswith("env PYTHONPATH="))
    pasted = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {line}"], text=True)
    assert pasted.splitlines() == said.command


def test_torchrun_starts_the_processes(launch, here):
    before = files_under(here)
    said = launch("pretrain_2b", DATA_PATH="corpus", GPUS_PER_NODE=2, TRAIN_ITERS=5)
    assert said.returncode == 0, said.stderr
    ranks = {(environment["RANK"], environment["WORLD_SIZE"], environment["OMP_NUM_THREADS"])
             for _, environment in said.processes}
    threads = str(max(1, os.cpu_count() // 2))
    assert ranks == {("0", "2", threads), ("1", "2", threads)}
    assert all("--dry-run" not in arguments for arguments, _ in said.processes)
    assert files_under(here) == before


# --- variables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables, flags", [
    ({"NUM_LAYERS": 3, "HIDDEN_SIZE": 96, "FFN_HIDDEN_SIZE": 7, "NUM_HEADS": 6, "NUM_KV_HEADS": 2,
      "SEQ_LEN": 128},
     {"--num-layers": "3", "--hidden-size": "96", "--ffn-hidden-size": "7", "--num-attention-heads": "6",
      "--num-query-groups": "2", "--seq-length": "128", "--max-position-embeddings": "128",
      "--kv-channels": None}),
    ({"KV_CHANNELS": 64, "MAX_POSITION_EMBEDDINGS": 99, "SEED": 0, "LR": "1e-3", "MIN_LR": "1e-4",
      "DATA_CACHE_PATH": "cache", "OUTPUT_HOME": "out", "WANDB_PROJECT": "p", "WANDB_EXP_NAME": "e"},
     {"--kv-channels": "64", "--max-position-embeddings": "99", "--seed": "0", "--lr": "1e-3",
      "--min-lr": "1e-4", "--data-cache-path": "cache", "--save": "out/checkpoint", "--wandb-project": "p",
      "--wandb-exp-name": "e", "--wandb-save-dir": "out"}),
    ({"GPUS_PER_NODE": 8, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0", "MASTER_PORT": 29876,
      "TP_SIZE": 2, "PP_SIZE": 2, "EP_SIZE": 1, "MICRO_BATCH": 2, "GRAD_ACC_STEPS": 3, "TASK_ID": "again"},
     {"--nproc_per_node": "8", "--nnodes": "2", "--node_rank": "1", "--master_addr": "node0",
      "--master_port": "29876", "--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "2",
      "--expert-model-parallel-size": "1", "--micro-batch-size": "2", "--global-batch-size": "24",
      "--save": "checkpoints/NEO_2b_nl18_tp2_pp2_mb2_gb24_gas3/again/checkpoint"}),
    ({"GLOBAL_BATCH_SIZE": 12, "MICRO_BATCH": 3, "TRAIN_ITERS": 90, "SAVE_INTERVAL": 10, "LOG_INTERVAL": 5},
     {"--global-batch-size": "12", "--train-iters": "90", "--exit-interval": "90", "--lr-warmup-iters": "30",
      "--save-interval": "10", "--log-interval": "5"}),
    ({"TRAIN_ITERS": 6001, "EXIT_ITERS": 50}, {"--exit-interval": "50", "--lr-warmup-iters": "2000"}),
    ({"TRAIN_ITERS": 90, "LR_WARMUP_ITERS": 4}, {"--lr-warmup-iters": "4"}),
])
def test_variables_become_flags(launch, variables, flags):
    said = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus", **variables)
    assert {flag: said.flag(flag) for flag in flags} == flags, said.stderr


def test_flags_that_stand_alone(launch):
    plain = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus").command
    assert "--bf16" in plain and "--enable-shuffle" not in plain and "--wandb-project" not in plain
    other = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus", ENABLE_SHUFFLE="true", PRECISION="fp32",
                   TP_SIZE=2).command
    assert "--bf16" not in other and "--enable-shuffle" in other and "--sequence-parallel" in other


def test_fp8_is_bf16_with_products_in_fp8(launch):
    command = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus", PRECISION="fp8").command
    assert "--bf16" in command and "--fp8" in command


def test_kv_heads_follow_the_heads_where_every_head_has_its_own(launch):
    for name, kv_heads in (("pretrain_7b", "4"), ("pretrain_2b", "1")):
        said = launch(name, "--dry-run", DATA_PATH="corpus", NUM_HEADS=4)
        assert said.flag("--num-query-groups") == kv_heads


@pytest.mark.parametrize("gpus, variables, processes, backend", [
    (8, {}, "8", "nccl"),
    (8, {"GPUS_PER_NODE": 4}, "4", "nccl"),
    (8, {"CUDA_VISIBLE_DEVICES": "0,3"}, "2", "nccl"),
    (8, {"CUDA_VISIBLE_DEVICES": "-1"}, "4", "nccl"),
    (0, {}, "4", "nccl"),
    (0, {"GPUS_PER_NODE": 2}, "2", "gloo"),
    (0, {"GPUS_PER_NODE": 8, "DISTRIBUTED_BACKEND": "nccl"}, "8", "nccl"),
])
def test_processes_of_a_dry_run(launch, gpus, variables, processes, backend):
    said = launch("pretrain_2b", "--dry-run", gpus=gpus, DATA_PATH="corpus", **variables)
    assert (said.flag("--nproc_per_node"), said.flag("--distributed-backend")) == (processes, backend)


def test_launchers_meet_at_ports_of_their_own_and_at_none_that_is_taken(launch, repository):
    first, second = (launch("pretrain_2b", "--dry-run").flag("--master_port") for _ in range(2))
    assert first != second
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        said = subprocess.run(["bash", "-c", f"source neo/scripts/launch.sh; free_port {port}"], cwd=repository,
                              text=True, capture_output=True, check=True)
    assert int(said.stdout) > port


def test_gpus_are_told_of_one_queue_where_they_need_it_and_to_keep_kernels(launch):
    queue, kept = "CUDA_DEVICE_MAX_CONNECTIONS", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"

    def told(**variables) -> list[str]:
        command = launch("pretrain_7b", "--dry-run", DATA_PATH="corpus", **variables).command
        return [word for word in command if word.startswith((queue, kept))]

    assert told() == [f"{kept}=1", f"{queue}=1"]
    assert told(**{queue: 8, kept: 0}) == [f"{kept}=0", f"{queue}=8"]
    assert told(TP_SIZE=1) == [f"{kept}=1"] and told(GPUS_PER_NODE=2) == []


@pytest.mark.parametrize("gpus, variables, overlaps", [
    (8, {}, True), (1, {}, False), (2, {"TP_SIZE": 2}, False), (8, {"OVERLAP": "false"}, False),
    (0, {"GPUS_PER_NODE": 2, "DISTRIBUTED_BACKEND": "gloo"}, False),
    (0, {"GPUS_PER_NODE": 2, "DISTRIBUTED_BACKEND": "gloo", "OVERLAP": "true"}, True)])
def test_communication_of_several_data_parallel_gpus_is_overlapped(launch, gpus, variables, overlaps):
    command = launch("pretrain_2b", "--dry-run", gpus=gpus, DATA_PATH="corpus", **variables).command
    assert [("--overlap-grad-reduce" in command), ("--overlap-param-gather" in command)] == [overlaps] * 2


def test_what_a_graph_cannot_record_is_not_overlapped(launch):
    said = launch("pretrain_2b", "--dry-run", "--", "--enable-cuda-graph", gpus=8, DATA_PATH="corpus")
    assert "--enable-cuda-graph" in said.command and "--overlap-grad-reduce" not in said.command
    asked = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus", OVERLAP="maybe")
    assert (asked.returncode, asked.stderr) == (2, "error: OVERLAP=maybe: must be one of: true false\n")


# --- data --------------------------------------------------------------------------------------------


def test_mixture_env_gives_data_batch_and_length(launch, here):
    write_mixture(here)
    said = launch("pretrain_2b", "--dry-run", GPUS_PER_NODE=2)
    assert said.returncode == 0, said.stderr
    place = said.command.index("--data-path")
    assert said.command[place:place + 5] == ["--data-path", "2000", "corpus", "--data-weights", "tokens"]
    assert said.flag("--train-iters") == "25"      # 2000 / (8 x 10)
    assert said.flag("--global-batch-size") == "8" and "GRAD_ACC_STEPS: 4" in said.stdout
    assert said.flag("--seq-length") == "10"


def test_mixture_env_may_stand_elsewhere(launch, here):
    write_mixture(here)
    (here / "sub").mkdir()
    for name in ("mixture.env", "mixture.blend"):
        (here / name).rename(here / "sub" / name)
    assert launch("pretrain_2b", "--dry-run", MIXTURE_ENV="sub/mixture.env").flag("--train-iters") == "25"


def test_data_path_keeps_mixture_env_out(launch, here):
    write_mixture(here)
    said = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus")
    assert said.flag("--train-iters") == "600400" and said.flag("--data-weights") is None


def test_a_long_mixture_goes_by_its_blend_file(launch, here):
    write_mixture(here, entries=5000)
    said = launch("pretrain_2b", "--dry-run")
    assert said.flag("--data-args-path") == "mixture.blend" and said.flag("--data-path") is None
    assert said.flag("--data-weights") == "tokens"
    (here / "mixture.blend").write_text("1 corpus\n")
    said = launch("pretrain_2b", "--dry-run")
    assert (said.returncode, said.stderr) == (2, "error: mixture.blend: not the blend of mixture.env; run "
                                                 "neo/scripts/gen_mixture_str.sh again\n")


def test_mixture_env_is_data_and_never_run(launch, here):
    write_mixture(here)
    text = (here / "mixture.env").read_text()
    evil = "$(touch pwned) `touch pwned` ; touch pwned"
    for old, new in (("DATA_PATH=2000 corpus", f"DATA_PATH={evil}"),
                     ("TRAIN_ITERS=25", f"TRAIN_ITERS={evil}"),
                     ("SEQ_LEN=10", f"SEQ_LEN=10\n{evil}"),
                     ("SEQ_LEN=10", "SEQ_LEN=10\nPYTHON=/bin/false")):
        (here / "mixture.env").write_text(text.replace(old, new))
        said = launch("pretrain_2b", "--dry-run")
        assert said.stderr.startswith(("error: mixture.env", "warning: mixture.env names")), said.stderr
        assert not (here / "pwned").exists()


def test_values_of_the_environment_are_never_run(launch, here):
    for name in ("TP_SIZE", "GPUS_PER_NODE", "TRAIN_ITERS", "SEED"):
        said = launch("pretrain_2b", "--dry-run", DATA_PATH="corpus", **{name: "a[$(touch pwned)]"})
        assert (said.returncode, said.stderr) == (
            2, f"error: {name}=a[$(touch pwned)]: must be a whole number of at least "
               f"{0 if name == 'SEED' else 1}\n")
    assert not (here / "pwned").exists()


def test_base64_counts_only_if_it_alone_names_a_dataset(launch, here):
    encoded = base64.b64encode(b"1.0 corpus").decode()
    said = launch("pretrain_2b", "--dry-run", DATA_PATH=encoded)
    assert said.command[said.command.index("--data-path") + 1:][:2] == ["1.0", "corpus"]
    assert "DATA_PATH (from DATA_PATH): --data-path 1.0 corpus" in said.stdout
    write_dataset(here / encoded, 10)
    assert launch("pretrain_2b", "--dry-run", DATA_PATH=encoded).flag("--data-path") == encoded


# --- where a run starts ------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")


def test_it_resumes_from_its_own_checkpoint(launch, here):
    variables = {"DATA_PATH": "corpus", "OUTPUT_HOME": "out"}
    assert launch("pretrain_2b", "--dry-run", **variables).flag("--load") is None
    (here / "out/checkpoint/.iter_0000010.partial").mkdir(parents=True)
    assert launch("pretrain_2b", "--dry-run", **variables).flag("--load") is None
    (here / "out/checkpoint/latest_checkpointed_iteration.txt").write_text("10\n")
    said = launch("pretrain_2b", "--dry-run", **variables)
    assert said.flag("--load") == "out/checkpoint" and "--finetune" not in said.command


def test_phase_2_takes_the_weights_of_another_run_until_it_has_its_own(launch, here):
    make_checkpoint(here / "first/checkpoint")
    variables = {"DATA_PATH": "corpus", "OUTPUT_HOME": "out", "LOAD_CHECKPOINT_PATH": "first/checkpoint"}
    said = launch("pretrain_7b_phase2", "--dry-run", **variables)
    assert said.stderr == ""
    assert said.flag("--load") == "first/checkpoint" and "--finetune" in said.command
    schedule = {"--lr-decay-style": "wsd", "--lr-warmup-iters": "0", "--wsd_decay_ratio": "0.1",
                "--wsd_half_life": "-1", "--lr_stable_steps": "0"}
    assert {flag: said.flag(flag) for flag in schedule} == schedule
    make_checkpoint(here / "out/checkpoint")
    said = launch("pretrain_7b_phase2", "--dry-run", **variables)
    assert said.flag("--load") == "out/checkpoint" and "--finetune" not in said.command


def test_phase_2_has_a_folder_of_its_own(launch):
    folders = {launch(name, "--dry-run", DATA_PATH="corpus").flag("--save") for name in LAUNCHERS}
    assert len(folders) == len(LAUNCHERS)


# --- mistakes ----------------------------------------------------------------------------------------

MISTAKES = {
    "word for a number": ({"TP_SIZE": "two"}, "TP_SIZE=two: must be a whole number of at least 1"),
    "zero": ({"MICRO_BATCH": 0}, "MICRO_BATCH=0: must be a whole number of at least 1"),
    "octal": ({"PP_SIZE": "08"}, "PP_SIZE=08: must be a whole number of at least 1"),
    "world and layout": (
        {"GPUS_PER_NODE": 3, "TP_SIZE": 2},
        "3 processes (NNODES=1 x GPUS_PER_NODE=3) are not a multiple of TP_SIZE=2 x PP_SIZE=1"),
    "batch and micro-batch": (
        {"GLOBAL_BATCH_SIZE": 10, "MICRO_BATCH": 4},
        "GLOBAL_BATCH_SIZE=10 is not a multiple of 1 data-parallel ranks x MICRO_BATCH=4"),
    "batch and accumulation": (
        {"GLOBAL_BATCH_SIZE": 10, "GRAD_ACC_STEPS": 4},
        "GRAD_ACC_STEPS=4 x 1 data-parallel ranks x MICRO_BATCH=1 is 4 samples a step, "
        "not the GLOBAL_BATCH_SIZE=10; unset GRAD_ACC_STEPS to have 10"),
    "choice": ({"ENABLE_SHUFFLE": "yes"}, "ENABLE_SHUFFLE=yes: must be one of: true false"),
    "precision": ({"PRECISION": "fp16"}, "PRECISION=fp16: must be one of: bf16 fp8 fp32"),
    "node rank": ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "n"}, "NODE_RANK=2: must be below NNODES=2"),
    "no address": ({"NNODES": 2}, "NNODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR (the address of"),
    "more GPUs than found": ({"GPUS_PER_NODE": 2, "DISTRIBUTED_BACKEND": "nccl"},
                             "GPUS_PER_NODE=2: 0 GPUs are found here"),
    "no tokenizer": ({"TOKENIZER_MODEL_PATH": "gone.model"}, "TOKENIZER_MODEL_PATH=gone.model: no such file"),
    "no script": ({"PY_SCRIPT_PATH": "gone.py"}, "PY_SCRIPT_PATH=gone.py: no such file"),
    "no dataset": ({"DATA_PATH": "1 corpus 1 gone"},
                   "DATA_PATH names 1 dataset(s) that are not here, first gone (.bin and .idx)"),
    "no weight": ({"DATA_PATH": "1 corpus corpus"}, "--data-path: 3 words are not pairs of weight and"),
    "no data": ({"DATA_PATH": ""}, "DATA_PATH is not set and there is no mixture.env here"),
    "no checkpoint": ({"LOAD_CHECKPOINT_PATH": "gone"}, "LOAD_CHECKPOINT_PATH=gone: no checkpoint there"),
    "no Python": ({"PYTHON": "gone"}, "no Python found"),
}


@pytest.mark.parametrize("variables, sentence", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence_before_anything_starts(launch, here, variables, sentence):
    before = files_under(here)
    said = launch("pretrain_2b", **{"DATA_PATH": "corpus", **variables})
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: {sentence}") and said.stderr.count("\n") == 1
    assert not said.processes and files_under(here) == before


def test_phase_2_needs_a_checkpoint(launch):
    said = launch("pretrain_7b_phase2", DATA_PATH="corpus")
    assert said.returncode == 2
    assert said.stderr == ("error: LOAD_CHECKPOINT_PATH is not set: phase 2 starts from another run's "
                           "weights\n")


def test_an_unknown_argument_says_what_is_known(launch):
    said = launch("pretrain_2b", "--dryrun")
    assert said.returncode == 2
    assert said.stderr == ("error: unknown argument '--dryrun': a launcher takes --dry-run, --help, and "
                           "after -- flags of pretrain_gpt.py\n")


@pytest.mark.parametrize("flags, sentence", [
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--hiden-size", "8"], "unknown flag --hiden-size; the nearest known one is --hidden-size")])
def test_a_mistaken_flag_is_found_before_torchrun_starts(launch, here, flags, sentence):
    before = files_under(here)
    said = launch("pretrain_7b", "--", *flags, PY_SCRIPT_PATH="", DATA_PATH="corpus", TRAIN_ITERS=5)
    assert (said.returncode, said.stderr) == (2, f"error: {sentence}\n")
    assert files_under(here) == before
    # No dry run, no GPU: one CPU process, which TP cannot be 2 for.
    assert (said.flag("--nproc_per_node"), said.flag("--distributed-backend")) == ("1", "gloo")
    assert said.flag("--tensor-model-parallel-size") == "1"


@pytest.mark.parametrize("variables, sentence", [
    ({"SEQ_LEN": 20}, "SEQ_LEN=20, but mixture.env was made for SEQ_LEN=10: its TRAIN_ITERS would"),
    ({"GLOBAL_BATCH_SIZE": 4}, "GLOBAL_BATCH_SIZE=4, but mixture.env was made for GLOBAL_BATCH_SIZE=8"),
    ({"GRAD_ACC_STEPS": 1}, "GRAD_ACC_STEPS=1 x 1 data-parallel ranks x MICRO_BATCH=1 is 1 samples a step, "
                            "not the GLOBAL_BATCH_SIZE=8 of mixture.env; unset GRAD_ACC_STEPS to have 8"),
    ({"MICRO_BATCH": 3}, "GLOBAL_BATCH_SIZE=8 of mixture.env is not a multiple of 1 data-parallel ranks x"),
    ({"TRAIN_ITERS": 26}, "TRAIN_ITERS=26 is more than the 25 that the tokens of mixture.env suffice for"),
])
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_a_batch_that_does_not_match_the_mixture_is_refused(launch, here, arguments, variables, sentence):
    write_mixture(here)
    said = launch("pretrain_2b", *arguments, **{"GPUS_PER_NODE": 1, **variables})
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: {sentence}") and said.stderr.count("\n") == 1


def test_a_stale_mixture_is_refused(launch, here):
    write_mixture(here)
    with open(here / "mixture.yml", "a") as config:
        config.write("# changed\n")
    said = launch("pretrain_2b", "--dry-run")
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: mixture.env: stale: {here / 'mixture.yml'} has changed since; run")


# --- the original's entry ----------------------------------------------------------------------------


def test_the_originals_script_path_still_works(run_tool):
    ours, originals = run_tool("pretrain_gpt.py", "--help"), run_tool("neo/pretrain_gpt_neo.py", "--help")
    assert ours.returncode == originals.returncode == 0, originals.stderr
    assert originals.stdout == ours.stdout


# --- a real run --------------------------------------------------------------------------------------


def test_a_small_shape_trains_stops_resumes_and_decays(launch, here, tiny_dataset):
    small = {"PY_SCRIPT_PATH": "", "DATA_PATH": tiny_dataset, "NUM_LAYERS": 2, "HIDDEN_SIZE": 32,
             "FFN_HIDDEN_SIZE": 64, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "SEQ_LEN": 32, "SAVE_INTERVAL": 100}
    first = launch("pretrain_2b", **small, OUTPUT_HOME="first", TRAIN_ITERS=4, EXIT_ITERS=2)
    assert first.returncode == 0, first.stderr
    assert (here / "first/checkpoint/latest_checkpointed_iteration.txt").read_text().strip() == "2"
    resumed = launch("pretrain_2b", **small, OUTPUT_HOME="first", TRAIN_ITERS=4)
    assert resumed.returncode == 0, resumed.stderr
    assert "iteration        3/" in resumed.stdout and "iteration        2/" not in resumed.stdout
    assert (here / "first/checkpoint/iter_0000004/run.json").is_file()

    decay = launch("pretrain_7b_phase2", **small, OUTPUT_HOME="second", TRAIN_ITERS=4, TP_SIZE=1,
                   LOAD_CHECKPOINT_PATH="first/checkpoint")
    assert decay.returncode == 0, decay.stderr
    run = json.loads((here / "second/checkpoint/iter_0000004/run.json").read_text())
    assert run["config"]["optim"]["lr_decay_style"] == "wsd"
    assert run["config"]["model"]["num_layers"] == 2 and run["iteration"] == 4
