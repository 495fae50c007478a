"""Trains one small model on real text with different layers, from one checkpoint on the same batches, and
compares where the losses end.

    python benchmarks/loss_curves.py --data-path PREFIX_text_document --scratch FOLDER
    python benchmarks/loss_curves.py --data-path PREFIX_text_document --scratch FOLDER --arm fused \\
        --arm "fused --fp8-format hybrid" --arm local
    python benchmarks/loss_curves.py --data-path PREFIX_text_document --scratch FOLDER --arm fused --arm fused

The last shows how far two runs of the same layers part. The model has NEO's shape in small: 4 layers of hidden
size 1024. An arm is what follows --transformer-impl; the first is what the others are compared with. Exit code 1
if an arm ends further away than its bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from megatron.pretrain.errors import UserError, entry
from megatron.pretrain.log.sinks import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("transformer_engine", "fused", "local", "fused --fp8-format hybrid")
LAST = 50
BF16_BOUND, FP8_BOUND = 0.005, 0.01
MODEL = ("--hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 8 --num-layers 4 "
         "--untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer --min-lr 3e-5 --lr 3e-4 "
         "--lr-decay-style cosine --lr-warmup-iters 30 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 "
         "--eod-mask-loss --split 1000,0,0 --log-interval 1").split()


@dataclass(frozen=True)
class Curve:
    """One arm's losses, an iteration each, and its median step."""

    arm: str
    losses: list[float]
    step_ms: float

    @property
    def end(self) -> float:
        """Mean loss of the last iterations."""
        return statistics.fmean(self.losses[-LAST:])

    def distance(self, other: Curve) -> float:
        """Relative distance of the ends."""
        return abs(self.end - other.end) / other.end


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    start = options.scratch / "start"
    train(options, "local", start, "--exit-interval", "1")
    folders = [options.scratch / f"arm_{number}" for number in range(len(options.arm))]
    with ThreadPoolExecutor(max_workers=len(folders) if options.at_once else 1) as runs:
        ended = runs.map(lambda arm, folder: curve(options, arm, folder, start), options.arm, folders)
        curves = list(track(ended, "arms", total=len(folders), console=Console(stderr=True)))
    return 0 if report(curves) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="a preprocessed dataset")
    parser.add_argument("--scratch", required=True, type=Path, metavar="FOLDER", help="an empty folder; 4 GB")
    parser.add_argument("--tokenizer-model", default=str(ROOT / "neo" / "tokenizer.model"), metavar="FILE")
    parser.add_argument("--arm", action="append", metavar="LAYERS", help=f"again for each; {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=300, help=f"iterations of each arm ({LAST} or more)")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--flags", default="", help="flags of pretrain_gpt.py for all arms, such as '--lr 1e-4'")
    parser.add_argument("--at-once", action="store_true", help="all arms side by side: their ms a step mean nothing")
    parser.add_argument("--peer-path", metavar="FOLDER", help="where transformer_engine is installed, if apart")
    options = parser.parse_args(arguments)
    options.arm = options.arm or list(ARMS)
    if options.steps < LAST:
        raise UserError(f"--steps {options.steps}: must be {LAST} or more, whose last {LAST} are compared")
    if options.scratch.exists() and any(options.scratch.iterdir()):
        raise UserError(f"--scratch {options.scratch}: not empty; name an empty or new folder")
    return options


def curve(options: argparse.Namespace, arm: str, folder: Path, start: Path) -> Curve:
    """Train one arm from the checkpoint in `start`."""
    train(options, arm, folder, "--load", str(start / "checkpoint"))
    records = read_metrics(folder / METRICS_FILE)
    return Curve(arm, [record["lm_loss"] for record in records],
                 statistics.median(record["elapsed_ms_per_iteration"] for record in records))


def train(options: argparse.Namespace, arm: str, folder: Path, *flags: str) -> None:
    """Run `pretrain_gpt.py` with the arm's layers; its output goes to FOLDER/log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
               "pretrain_gpt.py", *MODEL, "--train-iters", str(options.steps + 1), "--data-path", options.data_path,
               "--tokenizer-model", options.tokenizer_model, "--seq-length", str(options.seq_length),
               "--micro-batch-size", "1", "--global-batch-size", str(options.global_batch_size),
               "--log-dir", str(folder), "--transformer-impl", *arm.split(), *options.flags.split(), *flags]
    if "--exit-interval" in flags:
        command += ["--save", str(folder / "checkpoint")]
    folder.mkdir(parents=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if options.peer_path and arm.startswith("transformer_engine"):
        paths.insert(0, options.peer_path)
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with open(folder / "log", "w", encoding="utf-8") as log:
        ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ran.returncode:
        last = (folder / "log").read_text(encoding="utf-8").strip().splitlines()[-20:]
        raise UserError("\n".join([f"--transformer-impl {arm} failed; {folder / 'log'} ends:", *last]))


def report(curves: list[Curve]) -> bool:
    """Print the table; whether every arm ends within its bound of the first."""
    first, fits = curves[0], True
    print(f"| layers | first loss | mean of the last {LAST} | from {first.arm} | bound | ms a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for curve in curves:
        bound = FP8_BOUND if "fp8" in curve.arm else BF16_BOUND
        fits &= curve.distance(first) <= bound
        print(f"| {curve.arm} | {curve.losses[0]:.4f} | {curve.end:.4f} | {curve.distance(first):.3%} | {bound:.1%} "
              f"| {curve.step_ms:.1f} |")
    return fits


if __name__ == "__main__":
    entry(main)
