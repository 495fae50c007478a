"""How fast and in how much memory a checkpoint is converted, beside `cp` of the same bytes.

    python benchmarks/convert.py --model 2b --scratch FOLDER

makes a checkpoint of that model at full size in FOLDER (random weights in bf16, cut as tensor-parallel 2 cuts
them, by torch alone and tensor by tensor), converts it to Hugging Face and back, each alternating with `cp`,
and prints two tables in Markdown. All it makes is removed at the end.

Each run is a process of its own and is timed twice: until the process ends, and until `sync` has brought what
it wrote to the disk. Before a run its target is removed, the disk is synced, and the source is in the page
cache ("warm") or out of it ("cold"), for `cp` and for the conversion alike. Peak memory is VmHWM of
/proc/self/status, in which pages of mapped files count; `own` is the highest RssAnon seen, sampled every
10 ms, in which they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "neo/tokenizer.model"
FLAGS = {
    "tiny": "--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 "
            "--kv-channels 64 --group-query-attention --num-query-groups 1",
    "2b": "--num-layers 18 --hidden-size 2048 --ffn-hidden-size 16384 --num-attention-heads 8 "
          "--kv-channels 256 --group-query-attention --num-query-groups 1",
    "7b": "--num-layers 28 --hidden-size 3072 --ffn-hidden-size 24576 --num-attention-heads 16 "
          "--kv-channels 192"}
COMMON = ("--untie-embeddings-and-output-weights --seq-length 8192 --max-position-embeddings 8192 --bf16 "
          "--micro-batch-size 1 --global-batch-size 1024 --train-iters 6000 --lr 2e-4")
ITERATION = 6000


@dataclass(frozen=True)
class Run:
    """One timed process. Memory in bytes, where the process is ours."""

    seconds: float
    synced_seconds: float
    cpu_seconds: float
    peak_bytes: int = 0
    own_bytes: int = 0
    working_seconds: float = 0.0


def main() -> None:
    flags = _flags()
    if flags.work:
        print(json.dumps(work(flags.work, *flags.folders, flags.shard_bytes)))
        return
    scratch = flags.scratch / f"convert-{os.getpid()}"
    source, target, copy, back = (scratch / name for name in (f"iter_{ITERATION:07d}", "hf", "copy", "back"))
    try:
        scratch.mkdir(parents=True)
        make_checkpoint(source, flags.model)
        weights = weight_bytes(source)
        print(f"NEO-{flags.model}: {weights / 1e9:.2f} GB, shards of {flags.shard_bytes / 1e6:.0f} MB, "
              f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        rows = compare("to-hf", source, target, copy, flags)
        if not flags.no_reverse:
            rows += compare("to-megatron", target, back, copy, flags)
        print_speed(rows)
        print_memory(rows)
        if flags.all_at_once:
            shutil.rmtree(back, ignore_errors=True)
            shutil.rmtree(target)
            prepare(source, target, warm=True)
            print_all_at_once(timed(worker("all-at-once", source, target, flags.shard_bytes), target))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FLAGS, default="2b", help="which shape (default: 2b)")
    parser.add_argument("--scratch", type=Path, default=Path("."),
                        help="a folder on the disk to be measured; three times the model's bytes must fit")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"],
                        help="where the source's bytes are before a run")
    parser.add_argument("--shard-bytes", type=int, default=500 * 10**6,
                        help="largest shard (default: 500 MB)")
    parser.add_argument("--all-at-once", action="store_true",
                        help="also load everything and save_pretrained: takes three times the model's memory")
    parser.add_argument("--no-reverse", action="store_true", help="leave the way back out")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, type=Path, default=(), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(kind: str, source: Path, target: Path, copy: Path,
            flags: argparse.Namespace) -> list[tuple[str, str, list[Run], list[Run]]]:
    """Alternate `cp` and the conversion. Rows of (kind, cache, runs of cp, runs of the conversion)."""
    rows = []
    for cache in flags.cache:
        copies, conversions = [], []
        for _ in range(flags.rounds):
            prepare(source, copy, warm=cache == "warm")
            copies.append(timed(["cp", "-r", str(source), str(copy)], copy))
            shutil.rmtree(copy)
            prepare(source, target, warm=cache == "warm")
            conversions.append(timed(worker(kind, source, target, flags.shard_bytes), target))
        rows.append((kind, cache, copies, conversions))
    return rows


def prepare(source: Path, target: Path, *, warm: bool) -> None:
    """No target, nothing waiting to be written, and the source in the page cache or out of it."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in filter(Path.is_file, source.rglob("*")):
        with path.open("rb") as file:
            if not warm:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and file.read(2**24):
                pass


def worker(kind: str, source: Path, target: Path, shard_bytes: int) -> list[str]:
    return [sys.executable, __file__, "--work", kind, "--folders", str(source), str(target),
            "--shard-bytes", str(shard_bytes)]


def timed(command: list[str], target: Path) -> Run:
    used, started = cpu_of_children(), time.perf_counter()
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, cpu_seconds = time.perf_counter() - started, cpu_of_children() - used
    os.sync()
    said = json.loads(ran.stdout) if ran.stdout else {}
    assert target.is_dir()
    return Run(seconds, time.perf_counter() - started, cpu_seconds, **said)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


# What runs in a process of its own.

def work(kind: str, source: Path, target: Path, shard_bytes: int) -> dict[str, float]:
    """Do it, and say what it took. `working_seconds` leaves the start of Python and torch out."""
    peak = PeakMemory()
    seconds = WORK[kind](source, target, shard_bytes)
    return {"working_seconds": seconds, "peak_bytes": status_bytes("VmHWM"), "own_bytes": peak.stop()}


def to_hf(source: Path, target: Path, shard_bytes: int) -> float:
    from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion

    plan = plan_conversion(source, Options(tokenizer_path=TOKENIZER, max_shard_bytes=shard_bytes))
    started = time.perf_counter()
    run_conversion(plan, target)
    return time.perf_counter() - started


def to_megatron(source: Path, target: Path, shard_bytes: int) -> float:
    from megatron.pretrain.export.to_megatron import ImportOptions, plan_import, run_import

    plan = plan_import(source, ImportOptions())
    started = time.perf_counter()
    run_import(plan, target)
    return time.perf_counter() - started


def all_at_once(source: Path, target: Path, shard_bytes: int) -> float:
    """What a script does that does not stream: all into a state dict, a model around it, save_pretrained."""
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron.pretrain.export.convert import Options, plan_conversion
    from megatron.pretrain.export.elements import BF16
    from megatron.pretrain.export.hf_config import SpecialIds, config_json

    plan = plan_conversion(source, Options(tokenizer_path=TOKENIZER))
    started = time.perf_counter()
    entries = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    content = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(content, storage_reader=dcp.FileSystemReader(source), no_dist=True)
    weights = {}
    for name, rule in plan.rules:
        key = name.split(".")
        tensor = (content[".".join(key[:2] + key[3:])][int(key[2])] if key[1] == "layers" else content[name])
        for hf_name, rows in zip(rule.hf, rule.hf_rows(len(tensor), plan.shape)):
            weights[hf_name] = torch.cat([tensor[some.start:some.stop] for some in rows])
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**config_json(
        plan.architecture, plan.shape, SpecialIds(1, 2, 2), BF16)))
    model.load_state_dict(weights)
    model.save_pretrained(target, max_shard_size=shard_bytes)
    return time.perf_counter() - started


WORK = {"to-hf": to_hf, "to-megatron": to_megatron, "all-at-once": all_at_once}


class PeakMemory:
    """The highest RssAnon of this process, sampled by a thread."""

    def __init__(self) -> None:
        self._stopped, self._peak_bytes = threading.Event(), 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(0.01):
            self._peak_bytes = max(self._peak_bytes, status_bytes("RssAnon"))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak_bytes


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# The checkpoint.

def make_checkpoint(folder: Path, model: str) -> None:
    """Write what two tensor-parallel ranks save: a file each, and in each a chunk of every matrix."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata)

    from megatron.pretrain.checkpoint.manifest import Manifest, file_ends, file_sizes, package_versions
    from megatron.pretrain.cli import parse
    from megatron.pretrain.export.megatron_args import describe_tokenizer
    from megatron.pretrain.export.names import LLAMA
    from megatron.pretrain.export.shape import model_shape
    from megatron.pretrain.tokenizer import build_tokenizer

    config = parse([*FLAGS[model].split(), *COMMON.split(), "--tokenizer-model", str(TOKENIZER)]).config
    tokenizer = build_tokenizer(config.tokenizer)
    folder.mkdir()
    manifest = Manifest(
        iteration=ITERATION, consumed_samples=ITERATION * 1024, consumed_tokens=ITERATION * 1024 * 8192,
        config=config.as_dict(), tokenizer=describe_tokenizer(config.tokenizer, tokenizer),
        mixture_hash="0" * 64, train_state={}, versions=package_versions())
    shape = model_shape(manifest, tokenizer.vocab_size)
    # Drawing billions of normal numbers takes minutes; pieces of one long row of them are as good here.
    pool = torch.randn(2**27, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    entries, places = {}, {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(2)]
    for number, rule in enumerate(LLAMA.rules(shape)):
        size = [tokenizer.vocab_size if length is None else length for length in rule.megatron_shape(shape)]
        key, *layer = split_name(rule.megatron[0])
        for rank, at, part in cut(rule.megatron[0], size):
            first = number * 104_729 % (pool.numel() - part.numel())
            chunk = pool[first:first + part.numel()].clone().view(part.shape)
            file, whole, offsets = files[rank], list(size), list(at)
            if layer:
                chunk, whole, offsets = chunk[None], [shape.num_layers, *whole], [layer[0], *offsets]
            properties = TensorProperties(dtype=chunk.dtype)
            entry = entries.setdefault(key, TensorStorageMetadata(properties, torch.Size(whole), []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.size()))
            start = file.tell()
            torch.save(chunk, file)
            places[MetadataIndex(key, torch.Size(offsets))] = _StorageInfo(
                Path(file.name).name, start, file.tell() - start)
    for file in files:
        file.close()
    metadata = Metadata(state_dict_metadata=entries, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    replace(manifest, file_bytes=file_sizes(folder), file_ends=file_ends(folder)).write(folder)


def split_name(name: str) -> list:
    """`decoder.layers.3.mlp.linear_fc1.weight` -> the stacked name and 3; another name alone."""
    _, found, rest = name.partition("decoder.layers.")
    if not found:
        return [name]
    layer, _, inner = rest.partition(".")
    return [f"decoder.layers.{inner}", int(layer)]


def cut(name: str, size: list[int]) -> Iterator[tuple]:
    """Each chunk's rank, where it begins, and a tensor of its shape on the meta device."""
    import torch

    whole = torch.empty(size, device="meta")
    if len(size) == 1:
        yield 0, [0], whole
        return
    axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    pieces = 4 if "linear_fc1" in name else 2    # a rank holds a part of the gate and one of the up rows
    for number, part in enumerate(whole.chunk(pieces, dim=axis)):
        at = [0, 0]
        at[axis] = number * (size[axis] // pieces)
        yield number % 2, at, part


# The tables.

def print_speed(rows: list) -> None:
    print("| way | page cache | cp, s | conversion, s | of it at work, s | speed / cp | at work / cp "
          "| on disk / cp | CPU of cp, s | of the conversion, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind, cache, copies, runs in rows:
        print(f"| {kind} | {cache} | {spread([run.seconds for run in copies])} "
              f"| {spread([run.seconds for run in runs])} | {spread([run.working_seconds for run in runs])} "
              f"| {ratio(copies, runs, 'seconds', 'seconds')} "
              f"| {ratio(copies, runs, 'seconds', 'working_seconds')} "
              f"| {ratio(copies, runs, 'synced_seconds', 'synced_seconds')} "
              f"| {spread([run.cpu_seconds for run in copies])} "
              f"| {spread([run.cpu_seconds for run in runs])} |")


def print_memory(rows: list) -> None:
    print("\n| way | page cache | peak with mapped pages, GB | own, GB |\n|---|---|---|---|")
    for kind, cache, _, runs in rows:
        print(f"| {kind} | {cache} | {max(run.peak_bytes for run in runs) / 1e9:.2f} "
              f"| {max(run.own_bytes for run in runs) / 1e9:.2f} |")


def print_all_at_once(run: Run) -> None:
    print(f"\nall at once, with save_pretrained, warm: {run.seconds:.1f} s "
          f"({run.working_seconds:.1f} s at work), {run.synced_seconds:.1f} s until on the disk, "
          f"{run.cpu_seconds:.1f} s CPU; peak {run.peak_bytes / 1e9:.2f} GB, "
          f"own {run.own_bytes / 1e9:.2f} GB")


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.1f} ({min(numbers):.1f}-{max(numbers):.1f})"


def ratio(copies: list[Run], runs: list[Run], of_copy: str, of_run: str) -> str:
    """Of neighbours in time: how much of cp's speed the conversion reaches."""
    numbers = [getattr(one, of_copy) / getattr(other, of_run) for one, other in zip(copies, runs)]
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"


if __name__ == "__main__":
    main()
