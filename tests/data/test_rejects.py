"""Bad lines are left out, one by one and with their place, or end the run: in every kind of input alike."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import pytest
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.indexed import IndexedTokens, read_manifest
from megatron.pretrain.data.merge import merge_shards
from megatron.pretrain.data.preprocess import PreprocessConfig, preprocess
from megatron.pretrain.data.shard import Shard
from megatron.pretrain.errors import UserError

GOOD = {"text": "good", "n": 1}
BAD = [
    (b"", "blank line"), (b"{", "not valid JSON"), (b'{"text": "a"} x', "not valid JSON"),
    (b'{"n": 1}', "key missing"), (b'{"text": 7}', "not a string"), (b'{"text": ["a", "b"]}', "not a string"),
    (b'["text"]', "not an object"), (b'{"text": "\xff"}', "not UTF-8"),
    (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"), (b'{"text": "a\tb"}', "raw control character"),
    (b'{"text": "a\x00b"}', "raw control character"), (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply")]
TAKEN = [  # odd, and documents all the same: line, text
    (b'{"text": "crlf"}\r', "crlf"), (b'{"text": "nul \\u0000"}', "nul \0"), (b'{"text": ""}', ""),
    (b'{"text": "first", "text": "last"}', "last"), (b' \t{"text": "x", "n": NaN}', "x"),
    (b'{"text": "\\ud83d\\ude42"}', "\U0001f642"), (b'{"text": "\\ufeffa"}', "\ufeffa")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    good = json.dumps(GOOD).encode()
    lines = [good]
    for (bad, _), (odd, _) in zip(BAD, TAKEN * 2):
        lines += [bad, odd, good]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    return tmp_path / "corpus.jsonl"


def run(corpus: Path, tokenizer: Path, **settings):
    return preprocess(PreprocessConfig(**{
        "inputs": (str(corpus),), "output_prefix": str(corpus.with_name("out")), "append_eod": True,
        "tokenizer": TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tokenizer)),
        "skip_bad_lines": True, **settings}))


def rejects(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out_rejects.jsonl").read_bytes().splitlines()]


def test_each_bad_line_is_listed_and_each_good_one_encoded(corpus: Path, tiny_tokenizer: Path):
    summary = run(corpus, tiny_tokenizer)
    lines = corpus.read_bytes().split(b"\n")
    listed = rejects(corpus.parent)
    assert [each["line"] for each in listed] == [2 + 3 * number for number in range(len(BAD))]
    for each, (raw, kind) in zip(listed, BAD):
        assert each["file"] == str(corpus) and each["kind"] == kind and each["reason"]
        kept = each["text"].encode() if "text" in each else base64.b64decode(each["base64"])
        assert kept == raw == lines[each["line"] - 1]
        start = sum(len(line) + 1 for line in lines[:each["line"] - 1])
        assert start <= each["byte_offset"] <= start + len(raw)
    assert summary.rejected == {kind: [each for _, each in BAD].count(kind) for _, kind in BAD}
    assert read_manifest(summary.datasets[0].prefix)["rejected"] == summary.rejected
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    texts = ["good"] + [text for _, (_, odd) in zip(BAD, TAKEN * 2) for text in (odd, "good")]
    ids = [i for text in texts for i in (library.encode(text) + [2] if text else [])]
    assert IndexedTokens(summary.datasets[0].prefix).tokens.tolist() == ids


@pytest.mark.parametrize("native_encoder", [True, False])
@pytest.mark.parametrize("workers, chunk_bytes", [(1, 1 << 20), (2, 1), (5, 60), (2, 1000)])
def test_rejects_do_not_depend_on_workers(workers: int, chunk_bytes: int, native_encoder: bool, corpus: Path,
                                          tiny_tokenizer: Path):
    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in corpus.parent.glob("out*") if path.suffix != ".json"}

    run(corpus, tiny_tokenizer)
    straight = written()
    run(corpus, tiny_tokenizer, workers=workers, chunk_bytes=chunk_bytes, native_encoder=native_encoder)
    assert written() == straight


def test_rejects_of_compressed_input_are_those_of_its_text(corpus: Path, tiny_tokenizer: Path):
    run(corpus, tiny_tokenizer)
    plain = rejects(corpus.parent)
    packed = corpus.with_name("corpus.jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    run(packed, tiny_tokenizer, chunk_bytes=50, workers=2)
    assert rejects(corpus.parent) == [{**each, "file": str(packed)} for each in plain]


@pytest.mark.parametrize("count", [2, 5])
def test_shards_list_the_lines_of_the_whole(count: int, corpus: Path, tiny_tokenizer: Path):
    run(corpus, tiny_tokenizer)
    whole = rejects(corpus.parent)
    names = ("out_text_document.bin", "out_text_document.idx")
    straight = [corpus.with_name(name).read_bytes() for name in names]
    manifest = read_manifest(corpus.with_name("out_text_document"))
    for number in range(1, count + 1):
        run(corpus, tiny_tokenizer, shard=Shard(number, count), chunk_bytes=100)
    merge_shards(str(corpus.with_name("out")))
    assert rejects(corpus.parent) == whole
    assert [corpus.with_name(name).read_bytes() for name in names] == straight
    resumed = read_manifest(corpus.with_name("out_text_document"))
    assert {**resumed, "seconds": 0} == {**manifest, "seconds": 0}


@pytest.mark.parametrize("shard", [Shard(), Shard(3, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_first_bad_line_is_named_with_its_number(shard: Shard, packed: bool, corpus: Path,
                                                     tiny_tokenizer: Path):
    lines = [json.dumps(GOOD).encode() for _ in range(90)]
    lines[70:70] = [b"{}"]
    corpus.write_bytes(b"\n".join(lines))
    if packed and shard.count == 1:
        corpus = corpus.with_name("corpus.jsonl.gz")
        corpus.write_bytes(gzip.compress(b"\n".join(lines)))
    start = 70 * (len(lines[0]) + 1)
    sentence = rf"{corpus.name}, line 71 \(byte offset {start}\): has no key 'text'"
    with pytest.raises(UserError, match=sentence):
        run(corpus, tiny_tokenizer, skip_bad_lines=False, shard=shard, chunk_bytes=100, workers=3)


def test_nothing_but_bad_lines_is_refused(tmp_path: Path, tiny_tokenizer: Path):
    (tmp_path / "corpus.jsonl").write_bytes(b"{}\n" * 3 + b"[]\n")
    sentence = r"holds no document \(3 lines: key missing; 1 lines: not an object\)"
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "corpus.jsonl", tiny_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
