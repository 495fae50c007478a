"""An interrupted run goes on to the bytes of a straight one, or says why it cannot; others leave nothing."""

from __future__ import annotations

import gzip
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data import output as outputs
from megatron.pretrain.data.preprocess import PreprocessConfig, preprocess
from megatron.pretrain.data.shard import Shard
from megatron.pretrain.data.staging import StagedFiles, part_name
from megatron.pretrain.data.workers import WorkerGone
from megatron.pretrain.errors import Interruption, UserError

TEXTS = [*pydoc_data.topics.topics.values()][:12] + ["", "汉字 🙂"]
LINES = [json.dumps({"text": text, "title": text[:9]}).encode() for text in TEXTS]
LINES[3:3] = [b"{}", b"\xff", b""]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(b"\n".join(LINES[:7])))
    return path


def config(corpus: Path, tokenizer: Path, **settings) -> PreprocessConfig:
    return PreprocessConfig(**{
        "inputs": (str(corpus), str(corpus.with_name("more.jsonl.gz"))), "append_eod": True,
        "output_prefix": str(corpus.with_name("out")), "json_keys": ("text", "title"), "chunk_bytes": 3000,
        "tokenizer": TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tokenizer)),
        "skip_bad_lines": True, **settings})


def results(folder: Path) -> dict[str, bytes]:
    """Names and bytes of what a run wrote; of manifests, all but the time."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.name.startswith(("out", ".out"))}
    for name, content in found.items():
        if name.endswith(".json"):
            found[name] = {**json.loads(content), "seconds": 0}
    return found


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int, error: BaseException, *,
               commit: bool = False) -> None:
    """Let `error` strike when `chunks` chunks are counted as written, and more of them are.

    commit: note the place after each chunk.
    """
    written = outputs.RunOutput.written
    left = iter(range(chunks))

    def written_until(output):
        if next(left, None) is None:
            raise error
        written(output)

    monkeypatch.setattr(outputs.RunOutput, "written", written_until)
    monkeypatch.setattr(outputs, "SECONDS_BETWEEN_COMMITS", 0 if commit else 1000)


@pytest.mark.parametrize("chunks", [0, 1, 4, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143),
                                   WorkerGone("worker process 7 was killed"),
                                   Interruption("--input corpus.jsonl: Input/output error")])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
        chunks: int, error: BaseException, corpus: Path, tiny_tokenizer: Path,
        monkeypatch: pytest.MonkeyPatch):
    preprocess(config(corpus, tiny_tokenizer))
    straight = results(corpus.parent)
    files = {f"out_{key}_document.{ending}" for key in ("text", "title") for ending in ("bin", "idx", "json")}
    assert set(straight) == {"out_rejects.jsonl", *files}
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        stop_after(patch, chunks, error)
        preprocess(config(corpus, tiny_tokenizer))
    hidden = {name for name in results(corpus.parent) if name.startswith(".")}
    assert part_name("out.journal") in hidden and part_name("out_text_document.bin") in hidden
    summary = preprocess(config(corpus, tiny_tokenizer, resume=True, workers=2))
    assert results(corpus.parent) == straight
    assert summary.resumed is (chunks > 0)
    assert summary.rejected == {"key missing": 2, "not UTF-8": 2, "blank line": 2}


@pytest.mark.parametrize("opened", range(9))
def test_an_interruption_while_it_is_taken_up_again_costs_nothing(opened: int, corpus: Path, tiny_tokenizer: Path,
                                                                  monkeypatch: pytest.MonkeyPatch):
    preprocess(config(corpus, tiny_tokenizer))
    straight = results(corpus.parent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4, KeyboardInterrupt())
        preprocess(config(corpus, tiny_tokenizer))
    open_part, left = StagedFiles._open_part, iter(range(opened))

    def interrupted(staging: StagedFiles, *arguments: Any) -> BinaryIO:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return open_part(staging, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StagedFiles, "_open_part", interrupted)
        preprocess(config(corpus, tiny_tokenizer, resume=True))
    assert preprocess(config(corpus, tiny_tokenizer, resume=True)).resumed
    assert results(corpus.parent) == straight


def test_it_may_be_interrupted_again_and_again(corpus: Path, tiny_tokenizer: Path, monkeypatch):
    preprocess(config(corpus, tiny_tokenizer))
    straight = results(corpus.parent)
    for _ in range(100):
        with monkeypatch.context() as patch:
            stop_after(patch, 2, KeyboardInterrupt())
            try:
                preprocess(config(corpus, tiny_tokenizer, resume=True))
                break
            except KeyboardInterrupt:
                continue
    assert results(corpus.parent) == straight


KILL = """
import sys, os, signal, json
from megatron.pretrain.data import output, staging
from megatron.pretrain.data.preprocess import preprocess
sys.path.insert(0, {tests!r})
from test_resume import config
from pathlib import Path
where = {where!r}
if where == "chunk":
    output.SECONDS_BETWEEN_COMMITS = 0
    written, left = output.RunOutput.written, iter(range(5))
    def written_until(self):
        next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)
        written(self)
    output.RunOutput.written = written_until
else:
    replace, left = os.replace, iter(range(int(where)))
    def replace_until(old, new):
        next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    os.replace = replace_until
preprocess(config(Path({corpus!r}), Path({tokenizer!r})))
"""


@pytest.mark.parametrize("where", ["chunk", "0", "1", "4", "6"])
def test_a_killed_run_goes_on_even_from_the_middle_of_renaming(where: str, corpus: Path,
                                                               tiny_tokenizer: Path):
    preprocess(config(corpus, tiny_tokenizer))
    straight = results(corpus.parent)
    program = KILL.format(tests=str(Path(__file__).parent), where=where, corpus=str(corpus),
                          tokenizer=str(tiny_tokenizer))
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.returncode == -9, outcome.stderr
    assert preprocess(config(corpus, tiny_tokenizer, resume=True)).resumed
    assert results(corpus.parent) == straight


@pytest.mark.parametrize("settings, sentence", [
    ({"append_eod": False}, r"another append_eod \(true, now false\)"),
    ({"json_keys": ("title", "text")}, r"another json_keys \(\"text\", now \"title\"\)"),
    ({"skip_bad_lines": False}, r'another on_error \(\"skip\", now \"fail\"\)'),
    ({"inputs": ()}, "another inputs"),
])
def test_other_settings_cannot_go_on(settings: dict, sentence: str, corpus: Path, tiny_tokenizer: Path,
                                     monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2, KeyboardInterrupt())
        preprocess(config(corpus, tiny_tokenizer))
    before = results(corpus.parent)
    if "inputs" in settings:
        settings = {"inputs": (str(corpus),)}
    with pytest.raises(UserError, match=f"--resume: the interrupted run of out had {sentence}"):
        preprocess(config(corpus, tiny_tokenizer, resume=True, **settings))
    assert results(corpus.parent) == before


@pytest.mark.parametrize("change", ["content", "tokenizer", "parts"])
def test_changed_files_cannot_go_on(change: str, corpus: Path, tiny_tokenizer: Path, monkeypatch,
                                    tmp_path: Path):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2, KeyboardInterrupt())
        preprocess(config(corpus, tiny_tokenizer))
    tokenizer = tiny_tokenizer
    if change == "content":
        corpus.write_bytes(corpus.read_bytes().replace(b"the", b"THE"))
        sentence = "had another inputs .*corpus.jsonl has changed since"
    elif change == "tokenizer":
        tokenizer = Path(shutil.copy(Path(__file__).parent.parent.parent / "neo/tokenizer.model", tmp_path))
        sentence = "had another tokenizer"
    else:
        os.truncate(part_name(str(tmp_path / "out_text_document.bin")), 10)
        sentence = "out_text_document.bin.part is shorter than the interrupted run left it"
    with pytest.raises(UserError, match=sentence):
        preprocess(config(corpus, tokenizer, resume=True))


def test_without_resume_what_was_left_goes(corpus: Path, tiny_tokenizer: Path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2, KeyboardInterrupt())
        preprocess(config(corpus, tiny_tokenizer))
    preprocess(config(corpus, tiny_tokenizer, json_keys=("title",)))
    assert set(results(corpus.parent)) == {"out_rejects.jsonl", "out_title_document.bin",
                                           "out_title_document.idx", "out_title_document.json"}


def test_nothing_to_go_on_from_is_a_beginning(corpus: Path, tiny_tokenizer: Path):
    assert not preprocess(config(corpus, tiny_tokenizer, resume=True)).resumed


def test_a_failure_leaves_nothing(corpus: Path, tiny_tokenizer: Path, monkeypatch):
    with pytest.raises(UserError, match=r"corpus.jsonl, line 4 \(byte offset \d+\): has no key"):
        preprocess(config(corpus, tiny_tokenizer, skip_bad_lines=False))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stop_after(patch, 2, MemoryError())
        preprocess(config(corpus, tiny_tokenizer))
    assert results(corpus.parent) == {}


def test_two_runs_do_not_write_one_set(corpus: Path, tiny_tokenizer: Path):
    other = StagedFiles()
    other.create(str(corpus.with_name("out.journal"))).write(b"another run's")
    with pytest.raises(UserError, match="out.journal: another run is writing it"):
        preprocess(config(corpus, tiny_tokenizer))
    other.sync()
    assert results(corpus.parent) == {".out.journal.part": b"another run's"}
    other.discard()
    assert results(corpus.parent) == {}


def test_shards_are_resumed_one_by_one(corpus: Path, tiny_tokenizer: Path, monkeypatch):
    shard = Shard(1, 2)
    preprocess(config(corpus, tiny_tokenizer, shard=shard))
    straight = results(corpus.parent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2, KeyboardInterrupt())
        preprocess(config(corpus, tiny_tokenizer, shard=shard))
    assert preprocess(config(corpus, tiny_tokenizer, shard=shard, resume=True)).resumed
    assert results(corpus.parent) == straight
