"""The command as people type it: its flags, a sentence for a mistake, nothing left by a stopped run."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron.pretrain.data.indexed import IndexedTokens

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "preprocess_data.py"


@pytest.fixture
def preprocess(run_tool, tmp_path: Path, tiny_tokenizer: Path):
    """Run the tool in a folder that holds my-corpus.json and neo/tokenizer.model."""
    (tmp_path / "my-corpus.json").write_text('{"text": "one"}\n{"text": "two", "title": "2"}\n')
    (tmp_path / "neo").mkdir()
    shutil.copy(tiny_tokenizer, tmp_path / "neo" / "tokenizer.model")

    good = ("--input", "my-corpus.json", "--output-prefix", "out", "--tokenizer-model", "neo/tokenizer.model")

    def run(*flags: str, given: tuple[str, ...] = good) -> subprocess.CompletedProcess[str]:
        return run_tool(TOOL, *given, *flags, cwd=tmp_path)

    return run


LONG_RUN_FILES = 5


def outputs(folder: Path) -> list[str]:
    inputs = ("my-corpus.json", "neo", *(f"long-{number}.json" for number in range(LONG_RUN_FILES)))
    return sorted(path.name for path in folder.iterdir() if path.name not in inputs)


def assert_refused(outcome: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One sentence on standard error, exit code 2."""
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome.stderr
    for part in parts:
        assert part in outcome.stderr


def test_the_readmes_command_works_as_written(preprocess, tmp_path: Path):
    command = ("--input my-corpus.json --output-prefix my-corpus --tokenizer-model neo/tokenizer.model "
               "--tokenizer-type SentencePieceTokenizer --keep-sequential-samples --append-eod")
    outcome = preprocess(given=command.split())
    assert outcome.returncode == 0, outcome.stderr
    tokens = IndexedTokens(tmp_path / "my-corpus_text_document")
    assert tokens.n_documents == 2 and tokens.tokens[-1] == 2
    assert outputs(tmp_path) == [f"my-corpus_text_document.{ending}" for ending in ("bin", "idx", "json")]
    assert f"{tokens.n_tokens}" in outcome.stdout and "MB/s" in outcome.stdout
    assert "wrote my-corpus_text_document.bin" in outcome.stdout


@pytest.mark.parametrize("flags", [("--json-key", "text"), ("--json-keys", "text"), ("--json_keys=text",),
                                   ("--json-keys", "text", "--json-key", "text")])
def test_both_spellings_name_the_text(flags: tuple[str, ...], preprocess, tmp_path: Path):
    assert preprocess(*flags).returncode == 0
    assert IndexedTokens(tmp_path / "out_text_document").n_documents == 2


def test_another_key(preprocess, tmp_path: Path):
    (tmp_path / "my-corpus.json").write_text('{"title": "one"}\n')
    assert preprocess("--json-key", "title").returncode == 0
    assert outputs(tmp_path) == [f"out_title_document.{ending}" for ending in ("bin", "idx", "json")]


def test_several_inputs(preprocess, tmp_path: Path):
    assert preprocess("--input", "my-corpus.json", "my-corpus.json").returncode == 0
    manifest = json.loads((tmp_path / "out_text_document.json").read_text())
    assert len(manifest["sources"]) == 3 and manifest["documents"] == 6


@pytest.mark.parametrize("flags, sentence", [
    (("--partitions", "2"), "--partitions: not supported here; give --workers"),
    (("--split-sentences",), "--split-sentences: not supported here; a document is one sequence"),
    (("--keep_newlines",), "--keep-newlines: not supported here"),
    (("--lang=english",), "--lang: not supported here"),
    (("--vocab-file", "x"), "--vocab-file: not supported here"),
    (("--append-eos",), "unknown flag --append-eos; the nearest known one is --append-eod"),
    (("--inptu", "x"), "unknown flag --inptu; the nearest known one is --input"),
    (("--zzzz",), "unknown flag --zzzz; --help lists the known ones"),
    (("--workers", "0"), "--workers: '0' is not a whole number of at least 1"),
    (("--tokenizer-type", "BertTokenizer"), "--tokenizer-type: invalid choice: 'BertTokenizer'"),
    (("--json-keys", "title"), "my-corpus.json, line 1 (byte offset 0): has no key 'title'"),
    (("--tokenizer-model", "none.model"), "--tokenizer-model none.model: No such file"),
    (("--tokenizer-model", "my-corpus.json"), "my-corpus.json: is not a SentencePiece model"),
    (("--input", "none.json"), "--input none.json: No such file"),
    (("--input", "neo"), "--input neo: is a folder without .jsonl, .json, .ndjson files"),
    (("--input", "*.zst"), "--input *.zst: matches no file"),
    (("--shard", "0/3"), "--shard 0/3: is none of N parts; give I/N with I from 1 to N"),
    (("--shard", "1/2", "--input", "-"), "--shard 1/2: standard input cannot be divided"),
    (("--resume", "--input", "-"), "--resume: standard input cannot be read a second time"),
    (("--on-error", "stop"), "--on-error: invalid choice: 'stop'"),
    (("--output-prefix", "none/out"), "--output-prefix none/out: none is no folder"),
    (("--output-prefix", "my-corpus.json/out"), "my-corpus.json is no folder"),
    (("--output-prefix", "/sys/out"), "cannot write /sys/out.journal: "),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_mistake_is_a_sentence(flags: tuple[str, ...], sentence: str, preprocess, tmp_path: Path):
    assert_refused(preprocess(*flags), sentence)
    assert outputs(tmp_path) == []


def test_a_missing_flag_is_named(preprocess):
    assert_refused(preprocess(given=()), "the following arguments are required: --input, --output-prefix")


@pytest.mark.parametrize("line", [b"{", b"", b"{}", b'{"text": 1}', b"[]", b'{"text": "\xff"}',
                                  b'{"text": "\t"}', b'{"text": "\\ud800"}', b'\xef\xbb\xbf{"text": ""}'])
def test_a_bad_line_is_a_sentence_and_leaves_nothing(line: bytes, preprocess, tmp_path: Path):
    with (tmp_path / "my-corpus.json").open("ab") as file:
        file.write(line + b"\n" + b'{"text": "three"}\n')
    assert_refused(preprocess(), "error: my-corpus.json, line 3 (byte offset ")
    assert outputs(tmp_path) == []


def test_help_teaches(run_tool):
    outcome = run_tool(TOOL, "--help")
    assert outcome.returncode == 0
    for part in ("examples:", "--json-keys KEY [KEY ...], --json-key", "PREFIX_K_document.bin"):
        assert part in outcome.stdout


def test_it_starts_without_torch_and_transformers(run_tool, preprocess, tmp_path: Path):
    outcome = run_tool("-X", "importtime", TOOL, "--input", "my-corpus.json", "--output-prefix", "out",
                       "--tokenizer-model", "neo/tokenizer.model", cwd=tmp_path)
    assert outcome.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "sentencepiece" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "megatron.core"}


def test_without_the_install_it_says_how(run_tool):
    outcome = run_tool("-S", TOOL, "--help")  # -S: no site-packages, so no installed package
    assert_refused(outcome, "pip install -e .")


@pytest.fixture
def long_run(tmp_path: Path, tiny_tokenizer: Path):
    """A run of two workers that is surely not done within the test; ended afterwards if it still is there."""
    line = json.dumps({"text": "some words to be encoded one after another " * 2000}) + "\n"
    (tmp_path / "long-0.json").write_text(line * 2000)
    for number in range(1, LONG_RUN_FILES):
        os.link(tmp_path / "long-0.json", tmp_path / f"long-{number}.json")
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", "long-*.json", "--output-prefix", "out",
         "--tokenizer-model", str(tiny_tokenizer), "--workers", "2"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 2 and len(outputs(tmp_path)) == 5)
    yield process
    process.kill()


def heed_signals() -> None:
    """Also where the tests were started with signals ignored, as nohup does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; an orphan that nobody has buried yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


KEPT = "stopped; what is done is kept, and the same command with --resume goes on from there\n"


@pytest.mark.parametrize("number, code, said", [
    (signal.SIGINT, 130, KEPT + "interrupted\n"), (signal.SIGTERM, 143, KEPT), (signal.SIGHUP, 129, KEPT)])
def test_a_stopped_run_leaves_hidden_parts_alone(number: int, code: int, said: str, long_run, tmp_path: Path):
    workers = psutil.Process(long_run.pid).children()
    long_run.send_signal(number)
    assert long_run.communicate(timeout=30)[1] == said
    assert long_run.returncode == code
    assert all(name.startswith(".out") and name.endswith(".part") for name in outputs(tmp_path))
    assert not any(is_alive(worker) for worker in workers)


def test_a_killed_worker_ends_the_run(long_run, tmp_path: Path):
    psutil.Process(long_run.pid).children()[1].kill()
    said = long_run.communicate(timeout=30)[1]
    assert long_run.returncode == 2
    assert said.startswith("error: worker process ") and "was killed by SIGKILL" in said
    assert "with --resume goes on from there" in said and said.count("\n") == 1
    assert all(name.startswith(".out") for name in outputs(tmp_path))


def test_a_killed_run_takes_its_workers_along_and_is_resumed(long_run, tiny_tokenizer: Path, run_tool,
                                                             tmp_path: Path):
    workers = psutil.Process(long_run.pid).children()
    long_run.kill()
    wait_for(lambda: not any(is_alive(worker) for worker in workers), timeout_s=30)
    assert not list(tmp_path.glob("out*"))
    outcome = run_tool(TOOL, "--input", "long-*.json", "--output-prefix", "out", "--tokenizer-model",
                       tiny_tokenizer, "--workers", "1", "--resume", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outputs(tmp_path) == [f"out_text_document.{ending}" for ending in ("bin", "idx", "json")]
    written = IndexedTokens(tmp_path / "out_text_document")
    documents = written.tokens.reshape(2000 * LONG_RUN_FILES, -1)  # all of them are the same
    assert written.n_documents == 2000 * LONG_RUN_FILES and (documents == documents[0]).all()


def test_standard_input(tmp_path: Path, preprocess):
    assert preprocess().returncode == 0
    command = [sys.executable, str(TOOL), "--input", "-", "--output-prefix", "piped", "--tokenizer-model",
               "neo/tokenizer.model"]
    refusal = "error: standard input, line 3 (byte offset 46): has no key 'text'"
    for lines, code, said in ((b"", 0, ""), (b"{}\n", 2, refusal)):
        content = (tmp_path / "my-corpus.json").read_bytes() + lines
        outcome = subprocess.run(command, cwd=tmp_path, input=content, capture_output=True)
        assert outcome.returncode == code and outcome.stderr.decode().startswith(said), outcome.stderr
    for ending in ("bin", "idx"):
        assert ((tmp_path / f"piped_text_document.{ending}").read_bytes()
                == (tmp_path / f"out_text_document.{ending}").read_bytes())


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, tiny_tokenizer: Path):
    (tmp_path / "my-corpus.json").write_text(json.dumps({"text": "some words"}) + "\n")
    with (tmp_path / "my-corpus.json").open("a") as file:
        file.write((json.dumps({"text": "some more words " * 500}) + "\n") * 500)
    outcome = subprocess.run(
        [sys.executable, str(TOOL), "--input", "my-corpus.json", "--output-prefix", "out",
         "--tokenizer-model", str(tiny_tokenizer)], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)))
    assert_refused(outcome, "cannot write out_text_document.bin: File too large")
    assert outputs(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 512 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)],
                             capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name, document, documents", [("bin", "some more words " * 500, 500),
                                                       ("idx", "a", 20_000)])
def test_a_disk_that_fills_up_is_left_as_it_was(name: str, document: str, documents: int, small_disk: Path,
                                                tmp_path: Path, tiny_tokenizer: Path):
    (tmp_path / "my-corpus.json").write_text((json.dumps({"text": document}) + "\n") * documents)
    outcome = subprocess.run(
        [sys.executable, str(TOOL), "--input", str(tmp_path / "my-corpus.json"), "--output-prefix", "out",
         "--tokenizer-model", str(tiny_tokenizer)], cwd=small_disk, capture_output=True, text=True)
    assert_refused(outcome, f"cannot write out_text_document.{name}: No space left on device")
    assert list(small_disk.iterdir()) == []


def test_a_terminal_gets_a_bar(preprocess, tmp_path: Path):
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, str(TOOL), "--input", "my-corpus.json", "--output-prefix", "out",
                    "--tokenizer-model", "neo/tokenizer.model"], cwd=tmp_path, stderr=theirs, check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "preprocessing" in shown and "100%" in shown
