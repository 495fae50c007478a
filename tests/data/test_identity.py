"""Every way to a token set gives the same bytes: encoders, workers, chunks, shards, inputs; five corpora."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.indexed import IndexedTokens
from megatron.pretrain.data.merge import merge_shards
from megatron.pretrain.data.preprocess import PreprocessConfig, preprocess
from megatron.pretrain.data.shard import Shard

CORPORA = ("docs_and_code", "one_huge_line", "tiny_documents", "chinese", "random_base64")
SIZE_BYTES = 300_000


@pytest.fixture(scope="module")
def model(repository: Path) -> str:
    return str(repository / "neo/tokenizer.model")


@pytest.fixture(scope="module")
def corpora(repository: Path):
    spec = importlib.util.spec_from_file_location("corpora", repository / "benchmarks/corpora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request: pytest.FixtureRequest, corpora, model: str, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make = getattr(corpora, request.param)
    texts = list(make(SIZE_BYTES, model) if request.param == "chinese" else make(SIZE_BYTES))
    assert SIZE_BYTES <= sum(len(text.encode()) for text in texts)
    corpora.write(folder / "corpus.jsonl", iter(texts))
    return folder / "corpus.jsonl"


def run(corpus: Path, model: str, name: str, **settings) -> bytes:
    """The bytes of the .bin and .idx."""
    prefix = str(corpus.with_name(name))
    tokenizer = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    summary = preprocess(PreprocessConfig(**{
        "inputs": (str(corpus),), "output_prefix": prefix, "tokenizer": tokenizer, "append_eod": True,
        "chunk_bytes": 20_000, **settings}))
    return files(summary.datasets[0].prefix)


def files(prefix: str) -> bytes:
    return Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def straight(corpus: Path, model: str) -> bytes:
    """One worker, the library's encoder; its ids are sentencepiece's own."""
    import orjson

    written = run(corpus, model, "straight", native_encoder=False)
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    texts = [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    ids = [[*library.encode(text), library.eos_id()] if text else [] for text in texts]
    tokens = IndexedTokens(corpus.with_name("straight_text_document"))
    assert tokens.tokens.tolist() == list(itertools.chain.from_iterable(ids))
    assert tokens.sequence_lengths.tolist() == [len(each) for each in ids if each]
    return written


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_and_the_native_encoder(workers: int, corpus: Path, model: str, straight: bytes):
    assert run(corpus, model, "out", workers=workers) == straight


def test_compressed(corpus: Path, model: str, straight: bytes):
    packed = corpus.with_name("corpus.jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes(), 1))
    assert run(corpus, model, "out", inputs=(str(packed),), workers=2) == straight


def test_three_shards(corpus: Path, model: str, straight: bytes):
    for number in (1, 2, 3):
        run(corpus, model, "shards", shard=Shard(number, 3))
    merged, = merge_shards(str(corpus.with_name("shards")))
    assert files(merged.prefix) == straight


# VmHWM, because ru_maxrss of a process counts what the one that started it held.
MEASURE = """
import re, resource, sys
sys.path.insert(0, "tools")
import preprocess_data
preprocess_data.main(sys.argv[1:])
own = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path, model: str, repository: Path):
    """40 MB of short documents: a parent and workers below the 200 MB that README states, start included."""
    line = b'{"text": "%06d is one of many short documents that are not the same"}\n'
    with gzip.open(tmp_path / "many.jsonl.gz", "wb", 1) as file:
        for start in range(0, 600_000, 10_000):
            file.write(b"".join(line % number for number in range(start, start + 10_000)))
    outcome = subprocess.run(
        [sys.executable, "-c", MEASURE, "--input", tmp_path / "many.jsonl.gz",
         "--output-prefix", tmp_path / "out", "--tokenizer-model", model, "--workers", "2"],
        cwd=repository, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    parent_kib, workers_kib = map(int, outcome.stderr.split()[-2:])
    assert max(parent_kib, workers_kib) < 200 * 1024
