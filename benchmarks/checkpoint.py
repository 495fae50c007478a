"""How long a checkpoint takes to save and to load, and in how much host memory, beside megatron-core's own ways.

    python benchmarks/checkpoint.py --model neo-test --processes 2 --scratch FOLDER

Data-parallel processes with a distributed optimizer in bf16 save the same state: 14 bytes a weight. `project` is what
pretrain_gpt.py does, any layout to any other; `fully_reshardable` is megatron-core's way to the same files, and
`dp_reshardable` its way to files that only another data-parallel size can load. Arms take turns, each measurement in
processes of its own, which save twice: the second time counts, in a run that saves again and again. Memory is by how
much the largest process then exceeds what it had before the first, without the writers that it forks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import as_line, machine
from models import MODELS

ENGINE = ("fully_reshardable", "dp_reshardable")
ARMS = ("project", *ENGINE)


def main() -> int:
    flags = _flags()
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(flags.rounds):
        for arm in ARMS:
            runs[arm].append(_started(arm, flags))
            print(f"round {number + 1}, {arm}: save {runs[arm][-1]['save_s']:.2f} s", file=sys.stderr, flush=True)
    print(f"{flags.model}, {flags.processes} processes, {flags.rounds} rounds; {as_line(machine())}\n")
    print("\n".join(table(runs)))
    return 0


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians with the least and the greatest of the rounds, and in the last column a round's ratio of saving times."""
    lines = ["| arm | save s | load s | host GiB, saving | host GiB, loading | files GiB | times project's save |",
             "|---|---|---|---|---|---|---|"]
    for arm, measured in runs.items():
        figures = [_spread([run[name] for run in measured]) for name in
                   ("save_s", "load_s", "save_gib", "load_gib", "files_gib")]
        ratios = [run["save_s"] / ours["save_s"] for run, ours in zip(measured, runs["project"], strict=True)]
        lines.append(f"| {arm} | {' | '.join(figures)} | {_spread(ratios)} |")
    return lines


def _spread(values: list[float | None]) -> str:
    if None in values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def _started(arm: str, flags: argparse.Namespace) -> dict[str, Any]:
    """A measurement, in processes of its own."""
    shutil.rmtree(flags.scratch / "checkpoint", ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(flags.processes),
               __file__, "--measure", arm, "--model", flags.model, "--processes", str(flags.processes),
               "--scratch", str(flags.scratch)]
    ran = subprocess.run(command, text=True, capture_output=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    shutil.rmtree(flags.scratch / "checkpoint", ignore_errors=True)
    if ran.returncode:
        sys.exit(f"{arm} failed:\n{ran.stderr[-3000:]}")
    return json.loads(ran.stdout.partition("MEASURED ")[2])


def measure(arm: str, model: str, processes: int, folder: Path) -> None:
    """What one process of an arm does; rank 0 prints."""
    import psutil
    import torch.distributed as dist
    from train_step_config import run_config

    from megatron.pretrain.layout import placed
    from megatron.pretrain.model.build import build_model
    from megatron.pretrain.optim.optimizer import apply_schedule, build_optimizer, step

    config = run_config({"model": model, "layers": None, "impl": "local+no_overlap", "recipe": None, "tp": 1,
                         "dp": processes, "micro_batch": 1})
    with placed(config) as place:
        chunks = build_model(config, MODELS[model].vocab_size, place.device)
        optimizer = build_optimizer(config, chunks)
        apply_schedule(optimizer, config.optim.lr, 0.0)
        for parameter in chunks[0].parameters():
            parameter.main_grad.normal_()
        step(optimizer, config.optim.clip_grad)
        save, load = _project(config, chunks, optimizer, folder) if arm == "project" else \
            _engine(arm, chunks, optimizer, folder)
        before = psutil.Process().memory_info().rss
        save()
        found = {**_timed("save", save, before), **(_timed("load", load, before) if load else
                                                    {"load_s": None, "load_gib": None})}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        if place.is_main:
            slowest = {name: None if found[name] is None else max(each[name] for each in gathered) for name in found}
            files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print("MEASURED " + json.dumps({**slowest, "files_gib": files / 2**30}))
        dist.barrier()


def _project(config: Any, chunks: list[Any], optimizer: Any, folder: Path) -> tuple[Callable[[], Any], ...]:
    from megatron.pretrain.checkpoint.manifest import Manifest
    from megatron.pretrain.checkpoint.store import load_everything, save_checkpoint

    manifest = Manifest(iteration=1, consumed_samples=0, consumed_tokens=0, config=config.as_dict(), tokenizer={},
                        mixture_hash="", train_state={}, versions={})
    return (lambda: save_checkpoint(folder, chunks, optimizer, manifest),
            lambda: load_everything(folder / "iter_0000001", chunks, optimizer, updates=1, with_rng=True))


def _engine(kind: str, chunks: list[Any], optimizer: Any, folder: Path) -> tuple[Callable[[], Any] | None, ...]:
    """As Megatron-LM with --ckpt-fully-parallel-save, beside the one before until it is whole, as the project does.

    Loads only what the project's way can be compared with.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.utils import unwrap_model

    metadata = {"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True}

    def content(*, is_loading: bool) -> dict[str, Any]:
        model = {"model": unwrap_model(chunks[0]).sharded_state_dict()}
        return {**model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)}

    whole, partial = folder / "whole", folder / "partial"

    def save() -> None:
        if dist.get_rank() == 0:
            partial.mkdir(parents=True)
        dist.barrier()
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(),
                                                    parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist_checkpointing.save(content(is_loading=False), str(partial), strategy, content_metadata=metadata)
        if dist.get_rank() == 0:
            shutil.rmtree(whole, ignore_errors=True)
            partial.rename(whole)

    def load() -> None:
        loaded = dist_checkpointing.load(content(is_loading=True), str(whole))
        unwrap_model(chunks[0]).load_state_dict(loaded["model"], strict=False)
        optimizer.load_state_dict(loaded["optimizer"])

    return save, load if kind == "fully_reshardable" else None


def _timed(name: str, call: Callable[[], Any], before: int) -> dict[str, float]:
    import torch.distributed as dist

    dist.barrier()
    with _peak_growth(before) as grown:
        begin = time.perf_counter()
        call()
        dist.barrier()
        seconds = time.perf_counter() - begin
    return {f"{name}_s": seconds, f"{name}_gib": grown[0] / 2**30}


@contextmanager
def _peak_growth(before: int) -> Iterator[list[int]]:
    """By how many bytes this process's resident memory exceeds what it was `before`, looked at every 5 ms."""
    import psutil

    process, done, grown = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            grown[0] = max(grown[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="neo-test", help="(default: neo-test, 190 million weights)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes, a GPU each where there are "
                        "some (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each arm (default: 3)")
    parser.add_argument("--scratch", type=Path, required=True, metavar="FOLDER",
                        help="where checkpoints go; each is removed after it was measured")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if not flags.scratch.is_dir():
        parser.error(f"--scratch {flags.scratch}: there is no such folder")
    return flags


if __name__ == "__main__":
    asked = _flags()
    if asked.measure:
        measure(asked.measure, asked.model, asked.processes, asked.scratch / "checkpoint")
        sys.exit(0)
    sys.exit(main())
