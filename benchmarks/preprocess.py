"""How fast preprocessing is, against a pool of processes that run orjson and SentencePiece."""

from __future__ import annotations

import argparse
import filecmp
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import corpora
import numpy as np

from megatron.pretrain.data.indexed import IndexedWriter, count_tokens, token_dtype

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "preprocess_data.py"
POOL_CHUNK_BYTES = 1 << 20
DESCRIPTION = """\
Measure tools/preprocess_data.py and a pool of orjson + sentencepiece processes on five corpora, in turn,
several times, each in a process of its own; times include starting up, with compiled modules. CPU seconds
are those of all its processes, user and system. The ratio is of CPU seconds, pool by tool: the median of
the rounds, and the least and the greatest. Both must write the same bytes, or the benchmark fails."""


@dataclass(frozen=True)
class Time:
    """One run."""

    wall_s: float
    cpu_s: float


def main() -> None:
    flags = _parse()
    if flags.pool:
        _pool(*flags.pool, workers=flags.workers)
        return
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        _compile_modules(folder, flags)
        print(f"{flags.workers} workers, {flags.rounds} rounds, {flags.model}\n", flush=True)
        _print_row("corpus", "MB", "pool CPU s", "tool CPU s", "CPU ratio (least - greatest)", "pool MB/s",
                   "tool MB/s", "tool Mtokens/s", "wall ratio")
        _print_row(*["---"] * 9)
        for corpus, texts in _corpora(flags).items():
            if not flags.only or corpus in flags.only:
                _measure(corpus, texts, folder, flags)
        if not flags.only:
            _measure_scaling(folder, flags)
            _measure_start(folder, flags)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--model", default=str(REPOSITORY / "neo/tokenizer.model"),
                        help="SentencePiece model (default: the repository's)")
    parser.add_argument("--size-mb", type=float, default=200, help="of docs and code (default: 200); the "
                        "line is of 21 MB, the tiny documents are a million, random base64 a fifth of this")
    parser.add_argument("--chinese", metavar="FILE", help="JSON lines of real Chinese text, as chinese.py "
                        "makes them; up to three quarters of docs and code are used")
    parser.add_argument("--workers", type=int, default=2, help="of both (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--only", nargs="+", metavar="CORPUS", help="some of the corpora")
    parser.add_argument("--check", action="store_true", help="also hold 1, 2 and 5 workers, 3 shards, and a "
                        "run that is killed and resumed, to the same bytes")
    parser.add_argument("--folder", help="where the corpora are made, and removed (default: the system's)")
    parser.add_argument("--pool", nargs=3, metavar=("INPUT", "PREFIX", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _compile_modules(folder: Path, flags: argparse.Namespace) -> None:
    """Let all runs find compiled modules, as every run but the first does, whatever the environment says."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    source = folder / "small.jsonl"
    corpora.write(source, iter(["one document"]))
    _timed(partial(_run_pool, source, folder / "pool", flags))
    _timed(partial(_run_tool, source, folder / "tool", flags))


def _corpora(flags: argparse.Namespace) -> dict[str, Iterator[str]]:
    size_bytes = int(flags.size_mb * 1e6)
    scale = min(1.0, flags.size_mb / 200)
    chinese = (corpora.given(size_bytes * 3 // 4, flags.chinese) if flags.chinese
               else corpora.chinese(size_bytes // 5, flags.model))
    return {
        "docs and code": corpora.docs_and_code(size_bytes),
        "one line": corpora.one_huge_line(int(21e6 * scale)),
        "tiny documents": corpora.tiny_documents(int(60e6 * scale)),
        "Chinese": chinese,
        "random base64": corpora.random_base64(size_bytes // 5)}


def _measure(corpus: str, texts: Iterator[str], folder: Path, flags: argparse.Namespace) -> None:
    source = folder / "corpus.jsonl"
    size_mb = corpora.write(source, texts) / 1e6
    pool = partial(_run_pool, source, folder / "pool", flags)
    tool = partial(_run_tool, source, folder / "tool", flags)
    times = [(_timed(pool), _timed(tool)) for _ in range(flags.rounds)]
    _assert_same(folder / "pool", folder / "tool")
    ratios = sorted(theirs.cpu_s / ours.cpu_s for theirs, ours in times)
    pool_wall_s, tool_wall_s = (statistics.median(pair[side].wall_s for pair in times) for side in (0, 1))
    pool_cpu_s, tool_cpu_s = (statistics.median(pair[side].cpu_s for pair in times) for side in (0, 1))
    tokens = count_tokens(folder / "tool_text_document")
    _print_row(corpus, f"{size_mb:.0f}", f"{pool_cpu_s:.1f}", f"{tool_cpu_s:.2f}",
               f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} - {ratios[-1]:.1f})",
               f"{size_mb / pool_wall_s:.1f}", f"{size_mb / tool_wall_s:.1f}",
               f"{tokens / 1e6 / tool_wall_s:.1f}", f"{pool_wall_s / tool_wall_s:.1f}x")
    if flags.check:
        _check(corpus, source, folder, flags)


def _print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _measure_scaling(folder: Path, flags: argparse.Namespace) -> None:
    source = folder / "corpus.jsonl"
    corpora.write(source, corpora.docs_and_code(int(flags.size_mb * 1e6)))
    ratios = []
    for _ in range(flags.rounds):
        one, two = (_timed(partial(_run_tool, source, folder / "tool", flags, "--workers", workers)).wall_s
                    for workers in ("1", "2"))
        ratios.append(one / two)
    print(f"\ntwo workers against one, docs and code, wall: {statistics.median(ratios):.2f}x "
          f"({min(ratios):.2f} - {max(ratios):.2f})", flush=True)


def _measure_start(folder: Path, flags: argparse.Namespace) -> None:
    source = folder / "small.jsonl"
    times = [_timed(partial(_run_tool, source, folder / "tool", flags)) for _ in range(5)]
    wall_s, cpu_s = (statistics.median(getattr(time, name) for time in times) for name in ("wall_s", "cpu_s"))
    print(f"one small document, from start to end: {wall_s:.2f} s wall, {cpu_s:.2f} s CPU", flush=True)


def _timed(run: Callable[[], subprocess.Popen[bytes]]) -> Time:
    """Wait for the process; wait4 counts the children that it waited for, as the tool and the pool do."""
    started = time.monotonic()
    process = run()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return Time(time.monotonic() - started, usage.ru_utime + usage.ru_stime)


def _tool_command(source: Path, prefix: Path, flags: argparse.Namespace, *more: str) -> list[str]:
    return [sys.executable, str(TOOL), "--input", str(source), "--output-prefix", str(prefix),
            "--tokenizer-model", flags.model, "--append-eod", "--workers", str(flags.workers), *more]


def _run_tool(source: Path, prefix: Path, flags: argparse.Namespace, *more: str
              ) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_tool_command(source, prefix, flags, *more), stdout=subprocess.DEVNULL)


def _run_pool(source: Path, prefix: Path, flags: argparse.Namespace) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--workers", str(flags.workers),
                             "--pool", str(source), str(prefix), flags.model])


def _assert_same(one: Path, other: Path) -> None:
    for ending in (".bin", ".idx"):
        if not filecmp.cmp(f"{one}_text_document{ending}", f"{other}_text_document{ending}", shallow=False):
            raise SystemExit(f"{one}_text_document{ending} and {other}_text_document{ending} differ")


def _check(corpus: str, source: Path, folder: Path, flags: argparse.Namespace) -> None:
    """Every way to the same bytes."""
    for workers in ("1", "2", "5"):
        _timed(partial(_run_tool, source, folder / "other", flags, "--workers", workers))
        _assert_same(folder / "tool", folder / "other")
    for shard in (1, 2, 3):
        _timed(partial(_run_tool, source, folder / "shards", flags, "--shard", f"{shard}/3"))
    subprocess.run([sys.executable, str(REPOSITORY / "tools/merge_datasets.py"), "--output-prefix",
                    str(folder / "shards")], check=True, stdout=subprocess.DEVNULL)
    _assert_same(folder / "tool", folder / "shards")
    kills = _kill_and_resume(source, folder / "resumed", flags)
    _assert_same(folder / "tool", folder / "resumed")
    print(f"{corpus}: the same bytes with 1, 2 and 5 workers, in 3 shards, and after {kills} interruptions",
          file=sys.stderr, flush=True)


def _kill_and_resume(source: Path, prefix: Path, flags: argparse.Namespace) -> int:
    """Interrupt the run again and again, by SIGTERM and by SIGKILL in turn; returns how often."""
    kills, patience_s = 0, 0.3
    while True:
        process = _run_tool(source, prefix, flags, "--resume")
        try:
            if process.wait(timeout=patience_s):
                raise SystemExit(f"{process.args} ended with {process.returncode}")
            return kills
        except subprocess.TimeoutExpired:
            process.terminate() if kills % 2 == 0 else process.kill()
            process.wait()
            # A run that is killed before it notes its place gets no further; each gets longer than the last.
            kills, patience_s = kills + 1, patience_s * 1.3


def _pool(source: str, prefix: str, model: str, *, workers: int) -> None:
    """The yardstick: what anyone would write with orjson, sentencepiece and multiprocessing."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=model)
    dtype = token_dtype(library.vocab_size())
    with (multiprocessing.get_context("fork").Pool(workers, _pool_start, (library, dtype)) as pool,
          IndexedWriter(f"{prefix}_text_document", dtype) as writer):
        for tokens, lengths in pool.imap(_pool_encode, _pool_chunks(source)):
            writer.add_documents(tokens, lengths)
        pool.close()
        pool.join()


def _pool_chunks(source: str) -> Iterator[tuple[str, int, int]]:
    size_bytes, start = os.path.getsize(source), 0
    with open(source, "rb") as file:
        while start < size_bytes:
            file.seek(min(start + POOL_CHUNK_BYTES, size_bytes) - 1)
            file.readline()
            yield source, start, file.tell()
            start = file.tell()


def _pool_start(library: object, dtype: np.dtype) -> None:
    global POOL_LIBRARY, POOL_DTYPE  # a pool's tasks find what is theirs nowhere else
    POOL_LIBRARY, POOL_DTYPE = library, dtype


def _pool_encode(chunk: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray]:
    import orjson

    path, start, end = chunk
    with open(path, "rb") as file:
        file.seek(start)
        texts = [orjson.loads(line)["text"] for line in file.read(end - start).splitlines()]
    documents = POOL_LIBRARY.encode(texts, num_threads=1)
    for ids in documents:
        if ids:
            ids.append(POOL_LIBRARY.eos_id())
    lengths = np.fromiter(map(len, documents), np.int32, len(documents))
    return np.concatenate([np.array(ids, POOL_DTYPE) for ids in documents]), lengths


if __name__ == "__main__":
    main()
