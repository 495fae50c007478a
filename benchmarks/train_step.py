"""How fast a training step is, by implementation of the layers and by precision, measured in turn."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import machine
from models import MODELS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from train_step_config import OPTIONS
from train_step_tables import show
from train_step_turn import Turn

IMPLEMENTATIONS = ("fused", "transformer_engine", "local")
PRECISIONS = {"bf16": None, "fp8-delayed": "delayed", "fp8-tensorwise": "tensorwise"}
DESCRIPTION = """\
Measure the training step of a NEO model on random tokens. Each implementation of the layers, in each
precision, is an arm. Arms are measured in turn, --rounds times (A B A B A B), every measurement in a process
of its own, or one a GPU, which builds model and optimizer as pretrain_gpt.py does: fp32 gradients, and the
distributed optimizer. The processes of a round import together, before the first of them measures.

  fb         forward and backward of one micro-batch, gradients added up; no reduction, no update
  step       zero the gradients, fb, finish the gradients, clip, Adam
  optimizer  norm, clip and Adam alone

Each of the --steps calls is timed from an idle GPU to an idle GPU, after three steps to warm up; the median
counts. A table gives the median of the rounds, (least - greatest) beside it; a second one the ratios to
the arm of --against in the same precision and round: above 1 is faster. TFLOP/s count causal attention
once, half of the full square. MFU is of the data sheet's dense peak in the arm's precision."""
EXAMPLES = """\
examples:
  python benchmarks/train_step.py --model 7b --layers 14 --impl fused transformer_engine --json 7b.json
  python benchmarks/train_step.py --model 2b --impl fused transformer_engine --precision bf16 fp8-delayed
  python benchmarks/train_step.py --model 7b --tp 2 --impl fused transformer_engine --profile
  python benchmarks/train_step.py --model 7b --layers 14 --against fused \
      --impl fused fused+recompute_mlp fused+recompute_all                            # what recomputing buys
  python benchmarks/train_step.py --model tiny --impl local local --against local     # on any CPU
  python benchmarks/train_step.py --show 7b.json 2b.json                              # the tables again"""


@dataclass(frozen=True)
class Arm:
    """What is compared: an implementation in a precision."""

    name: str
    impl: str
    precision: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


def main() -> int:
    flags = _parse()
    if flags.show:
        for path in flags.show:
            print(show(json.loads(path.read_text(encoding="utf-8"))), "\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # as an interrupt does, it ends what was started
    results = {"settings": _settings(flags), "machine": machine(), "arms": [], "runs": [], "left_out": {}}
    results["arms"] = [asdict(arm) for arm in arms_of(flags.impl, flags.precision)]
    with tempfile.TemporaryDirectory() as scratch:
        logs = flags.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        measure(flags, results, logs)
    print("\n" + show(results), flush=True)
    return 1 if any(run["failed"] for run in results["runs"]) else 0


def arms_of(implementations: Sequence[str], precisions: Sequence[str]) -> list[Arm]:
    """Every implementation in every precision; one that is given again is an arm again, with a number."""
    arms = []
    for precision in precisions:
        for number, impl in enumerate(implementations):
            again = implementations[:number].count(impl)
            arms.append(Arm(f"{impl} #{again + 1}" if again else impl, impl, precision))
    return arms


def measure(flags: argparse.Namespace, results: dict[str, Any], logs: Path) -> None:
    """All rounds. The results are written to --json after every measurement."""
    arms = [Arm(**arm) for arm in results["arms"]]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(arms) * flags.rounds)
        for number in range(flags.rounds):
            progress.update(task, description=f"round {number + 1}/{flags.rounds}: importing",
                            completed=number * len(arms))
            with ExitStack() as started:
                turns = [(arm, started.enter_context(_started(flags, number, arm, logs)))
                         for arm in arms if arm.label not in results["left_out"]]
                until = time.monotonic() + flags.timeout
                for _, turn in turns:    # nobody imports while another is timed
                    turn.wait_until_ready(until)
                for arm, turn in turns:
                    progress.update(task, description=f"round {number + 1}/{flags.rounds}: {arm.label}")
                    run = {"arm": arm.name, "precision": arm.precision, "round": number, **turn.take(flags.timeout)}
                    _take(run, arm.label, number, results)
                    progress.advance(task)
                    if flags.json:
                        _write(flags.json, results)


def _started(flags: argparse.Namespace, number: int, arm: Arm, logs: Path) -> Turn:
    spec = {**_settings(flags), "impl": arm.impl, "recipe": PRECISIONS[arm.precision], "round": number,
            # A profile disturbs nothing that is measured before it; one of each arm is enough.
            "profile": flags.profile and number == 0}
    return Turn(spec, logs / f"{arm.label.replace(' ', '-').replace('#', '')}-round{number + 1}.log")


def _take(run: dict[str, Any], label: str, number: int, results: dict[str, Any]) -> None:
    """Keep what a measurement found, and say it in a line."""
    if "left_out" in run:
        results["left_out"][label] = run["left_out"]
        print(f"{label}: left out: {run['left_out']}", flush=True)
        return
    results["runs"].append(run)
    for part, failure in run["failed"].items():
        print(f"FAILED {label}, round {number + 1}, {part}: {failure['reason']}", flush=True)
    medians = [f"{part} {statistics.median(run[f'{part}_ms']):.1f} ms"
               for part in ("fb", "step", "optimizer") if f"{part}_ms" in run]
    if medians:
        print(f"{label}, round {number + 1}: {', '.join(medians)}, loss {run.get('loss', float('nan')):.3f}, "
              f"{run['seconds']:.0f} s", flush=True)


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in
            ("model", "layers", "micro_batch", "tp", "dp", "steps", "rounds", "against")}


def _write(path: Path, results: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(results, indent=1), encoding="utf-8")
    fresh.replace(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b", help="(default: 7b; tiny is for CPUs)")
    parser.add_argument("--layers", type=_count, help="keep only so many layers of it")
    parser.add_argument("--micro-batch", type=_count, default=1, help="samples a forward pass (default: 1)")
    parser.add_argument("--tp", type=_count, default=1, help="tensor-parallel size (default: 1)")
    parser.add_argument("--dp", type=_count, default=1, help="data-parallel size (default: 1)")
    parser.add_argument("--impl", nargs="+", default=["fused", "transformer_engine"], metavar="IMPL",
                        type=_implementation,
                        help="fused, transformer_engine or local (default: fused and transformer_engine), and "
                        f"behind a + what else is set: {', '.join(OPTIONS)}; twice the same one shows the noise")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=PRECISIONS, metavar="PRECISION",
                        help=f"{', '.join(PRECISIONS)} (default: bf16)")
    parser.add_argument("--against", default="transformer_engine", metavar="IMPL",
                        help="whose times the ratios divide (default: transformer_engine)")
    parser.add_argument("--rounds", type=_count, default=3, help="measurements of each arm (default: 3)")
    parser.add_argument("--steps", type=_count, default=8, help="timed calls of each part (default: 8)")
    parser.add_argument("--profile", action="store_true",
                        help="also where the GPU's time goes, over three steps of each arm's first round")
    parser.add_argument("--timeout", type=float, default=300, metavar="S",
                        help="give a round's imports up after so many seconds, and so each measurement (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what the processes printed")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE",
                        help="measure nothing: print the tables of files of --json")
    flags = parser.parse_args()
    for path in flags.show or ():
        if not path.is_file():
            parser.error(f"--show {path}: there is no such file")
    if flags.json and not flags.json.resolve().parent.is_dir():
        parser.error(f"--json {flags.json}: its folder does not exist")
    return flags


def _implementation(text: str) -> str:
    layers, *options = text.split("+")
    if layers not in IMPLEMENTATIONS or not set(options) <= set(OPTIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(IMPLEMENTATIONS)}, and behind a + "
                                         f"{', '.join(OPTIONS)}")
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
