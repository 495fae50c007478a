"""`batch_convert_ckpt.sh`: checkpoints, chosen by the tokens they have seen, to Hugging Face folders."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from megatron.pretrain.data.flags import FlagParser, positive_number
from megatron.pretrain.errors import UserError
from megatron.pretrain.export import EXPORT_FILE
from megatron.pretrain.export.batch_config import BatchConfig, read_config, write_template
from megatron.pretrain.export.choose import (
    Choice, SavedIteration, billions, closest, find_saved, folder_names)

if TYPE_CHECKING:
    from megatron.pretrain.export.convert import Options
    from megatron.pretrain.export.jobs import Outcome, Task

DEFAULT_CONFIG = Path("neo/scripts/converter_cfg.yml")

_UNITS_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Job:
    """A conversion to be done: what, where to, and what for."""

    source: Path
    target: Path
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of a job; `failure` is the sentence that says why it failed."""

    job: Job
    said: str
    failure: str = ""


def main(argv: Sequence[str]) -> int | None:
    """The entry of neo/scripts/batch_convert_ckpt.py."""
    flags = _parser().parse(argv)
    if flags.generate_config:
        write_template(flags.generate_config)
        print(f"wrote {flags.generate_config}: fill it in, then run with --config {flags.generate_config}")
        return None
    if _is_single(flags):
        jobs, options = [Job(flags.megatron_dir, flags.hf_dir)], _options(flags, None)
    else:
        config = read_config(flags.config)
        jobs, options = _chosen(config, flags.rename_hf_by_billions), _options(flags, config)
    results = _run(jobs, options, flags)
    _print_results(results)
    _raise_failures(results)
    return None


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="batch_convert_ckpt.sh",
        description="Convert a run's checkpoints to folders that transformers, vLLM and lm-eval read. For\n"
        "each number of tokens in the configuration, the saved iteration closest to it is taken.",
        epilog="examples:\n"
        "  bash neo/scripts/batch_convert_ckpt.sh\n"
        "  bash neo/scripts/batch_convert_ckpt.sh --config my_cfg.yml --rename-hf-by-billions --dry-run\n"
        "  bash neo/scripts/batch_convert_ckpt.sh --jobs 4 --verify\n"
        "  bash neo/scripts/batch_convert_ckpt.sh --megatron-dir RUN/iter_0002000 --hf-dir my-model")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE.yml",
                        help=f"the configuration (default: {DEFAULT_CONFIG})")
    parser.add_argument("--generate-config", type=Path, nargs="?", const=Path("converter_cfg.yml"),
                        metavar="FILE.yml", help="write a configuration to start from, and stop")
    parser.add_argument("--rename-hf-by-billions", action="store_true",
                        help="call a folder 10.49B after the tokens seen, not iter_0002000")
    parser.add_argument("--skip-existing", action="store_true",
                        help="leave folders that exist as they are; without it they are an error")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--verify", action="store_true",
                        help="before a folder gets its name: hold the checkpoint against its checksums, read "
                             "each tensor back from the disk and compare it, and where memory allows compare "
                             "the logits of both sides on a sample text")
    parser.add_argument("--jobs", type=positive_number, default=1, metavar="N",
                        help="checkpoints to convert at once, each in a process of its own (default: 1)")
    parser.add_argument("--max-shard-size", type=_size_bytes, default="5GB", metavar="SIZE",
                        help="largest .safetensors file, such as 500MB (default: 5GB)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"),
                        help="type of the weights; over BF16 of the configuration")
    parser.add_argument("--architecture", metavar="NAME",
                        help="MistralForCausalLM, say (default: LlamaForCausalLM; Qwen3ForCausalLM where "
                             "queries and keys have norms)")
    parser.add_argument("--vocab-size", type=positive_number, metavar="N",
                        help="vocabulary rows to keep; over VOCAB_SIZE (default: one for each id of the "
                             "tokenizer). Rows that only pad are dropped; on the way back to Megatron others "
                             "are made up. To have the same ones again give the padded number, such as 64256")
    parser.add_argument("--tokenizer-dir", type=Path, metavar="PATH",
                        help="the tokenizer's file or folder; over TOKENIZER_DIR (default: as the run)")
    single = parser.add_argument_group("one checkpoint, without a configuration")
    single.add_argument("--megatron-dir", type=Path, metavar="DIR/iter_NNNNNNN", help="the checkpoint")
    single.add_argument("--hf-dir", type=Path, metavar="DIR", help="the folder to make")
    return parser


def _size_bytes(text: str) -> int:
    """An argparse type: `5GB`, `500MB`, `2GiB`, or plain bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), flags=re.IGNORECASE)
    unit_bytes = _UNITS_BYTES.get(match[2].upper(), 0) if match else 0
    size_bytes = int(float(match[1]) * unit_bytes) if match else 0
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write one such as 5GB or 500MB")
    return size_bytes


def _is_single(flags: argparse.Namespace) -> bool:
    if (flags.megatron_dir is None) != (flags.hf_dir is None):
        raise UserError("--megatron-dir and --hf-dir belong together: from where, and to where")
    if flags.megatron_dir and flags.rename_hf_by_billions:
        raise UserError("--rename-hf-by-billions: --hf-dir names the folder already; give one of the two")
    return flags.megatron_dir is not None


def _chosen(config: BatchConfig, by_billions: bool) -> list[Job]:
    """One job for each iteration that is closest to a target, or to several."""
    saved = find_saved(config.checkpoints, config.seq_len, config.global_batch_size, _warn)
    wishes: dict[SavedIteration, list[Choice]] = {}
    for wanted_tokens in config.keep_at_tokens:
        choice = closest(wanted_tokens, saved)
        wishes.setdefault(choice.saved, []).append(choice)
        print(f"Closest checkpoint to {billions(wanted_tokens)} tokens: {choice.saved.folder}, corresponding "
              f"tokens: {billions(choice.saved.tokens)}, diff: {billions(choice.off_by_tokens)}")
    names = folder_names(list(wishes), by_billions, lambda name: _converted_iteration(config.targets / name))
    return [Job(one.folder, config.targets / names[one], tuple(choices)) for one, choices in wishes.items()]


def _options(flags: argparse.Namespace, config: BatchConfig | None) -> Options:
    """What the flags say, or else the configuration."""
    from megatron.pretrain.export.convert import Options
    from megatron.pretrain.export.elements import WEIGHT_TYPES

    vocab_size, tokenizer, dtype = flags.vocab_size, flags.tokenizer_dir, flags.dtype
    if config is not None:
        vocab_size, tokenizer = vocab_size or config.vocab_size, tokenizer or config.tokenizer
        dtype = dtype or {None: None, True: "bf16", False: "fp32"}[config.bf16]
    return Options(vocab_size, tokenizer, dtype and WEIGHT_TYPES[dtype], flags.max_shard_size,
                   flags.architecture)


def _run(jobs: Sequence[Job], options: Options, flags: argparse.Namespace) -> list[Result]:
    """Check all jobs before the first is done, so that a mistake shows before the work begins."""
    from megatron.pretrain.export.convert import plan_conversion
    from megatron.pretrain.export.jobs import Task, convert_all

    tasks: dict[Job, Task] = {}
    for job in jobs:
        if not job.target.exists():
            size_bytes = plan_conversion(job.source, options).size_bytes
            tasks[job] = Task(job.source, job.target, options, flags.verify, size_bytes)
        elif not flags.skip_existing:
            raise UserError(f"{job.target} exists: remove it, or let --skip-existing leave it as it is")
    if flags.dry_run:
        said = {job: Result(job, f"would be converted, {_size(task.size_bytes)}")
                for job, task in tasks.items()}
    else:
        outcomes = convert_all(list(tasks.values()), flags.jobs)
        said = {job: _result(job, task, outcome) for (job, task), outcome in zip(tasks.items(), outcomes)}
    return [said.get(job, Result(job, "exists, skipped")) for job in jobs]


def _result(job: Job, task: Task, outcome: Outcome) -> Result:
    if outcome.failure:
        return Result(job, "failed", outcome.failure)
    said = f"converted, {_size(task.size_bytes)} in {outcome.seconds:.1f} s"
    return Result(job, f"{said}\n{outcome.verified}" if outcome.verified else said)


def _raise_failures(results: Sequence[Result]) -> None:
    failures = [result.failure for result in results if result.failure]
    if len(failures) == 1:
        raise UserError(failures[0])
    if failures:
        raise UserError(f"{len(failures)} of {len(results)} failed: {'; '.join(failures)}")


def _converted_iteration(target: Path) -> int | None:
    """The iteration that an earlier conversion put into `target`; None if there is none."""
    try:
        return orjson.loads((target / EXPORT_FILE).read_bytes())["iteration"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _print_results(results: Sequence[Result]) -> None:
    """A row for each target; of several that one checkpoint serves, the first says what became of it."""
    table = Table(box=box.SIMPLE, caption=f"folders are in {results[0].job.target.parent}")
    for name in ("wanted", "tokens", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("checkpoint", "folder"):
        table.add_column(name, no_wrap=True)
    table.add_column("")
    for result in results:
        names, said = (result.job.source.name, result.job.target.name), result.said
        for choice in result.job.choices or (None,):
            table.add_row(*_tokens(choice), *names, said)
            said = "the same"
    Console(highlight=False, markup=False).print(table)


def _tokens(choice: Choice | None) -> tuple[str, ...]:
    if choice is None:
        return "", "", ""
    return billions(choice.wanted_tokens), billions(choice.saved.tokens), billions(choice.off_by_tokens)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"


def _warn(note: str) -> None:
    print(f"[WARN] {note}", file=sys.stderr)
