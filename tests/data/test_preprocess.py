"""The files are those of Megatron-LM's algorithm, whatever the workers; a failed run leaves nothing."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.indexed import IndexedTokens, read_manifest
from megatron.pretrain.data.preprocess import PreprocessConfig, preprocess
from megatron.pretrain.errors import UserError

TEXTS = [*pydoc_data.topics.topics.values()][:20] + ["", "汉字 🙂", " ", "", "last </s>"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text, "title": text[:9], "id": number}, ensure_ascii=number % 2 == 0)
             for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(corpus: Path, tokenizer: Path, **settings) -> PreprocessConfig:
    legacy = settings.pop("legacy", False)
    return PreprocessConfig(**{
        "inputs": (str(corpus),), "output_prefix": str(corpus.with_name("out")), "append_eod": True,
        "tokenizer": TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tokenizer),
                                     tokenizer_sentencepiece_legacy=legacy), **settings})


def written(folder: Path, stem: str = "out") -> dict[str, bytes]:
    """All files but the manifests, which say how long it took."""
    return {path.name: path.read_bytes() for path in folder.glob(f"{stem}*") if path.suffix != ".json"}


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_equal_megatrons_algorithm_on_the_engines_builder(
        append_eod: bool, corpus: Path, tiny_tokenizer: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    preprocess(config(corpus, tiny_tokenizer, append_eod=append_eod, workers=2, chunk_bytes=5000))
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    builder = IndexedDatasetBuilder(str(corpus.with_name("engine.bin")), dtype=np.uint16)
    for line in corpus.read_text(encoding="utf-8").split("\n")[:-1]:
        ids = library.encode_as_ids(json.loads(line)["text"])
        if ids and append_eod:
            ids.append(library.eos_id())
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(corpus.with_name("engine.idx")))
    for ending in ("bin", "idx"):
        ours = corpus.with_name(f"out_text_document.{ending}")
        assert ours.read_bytes() == corpus.with_name(f"engine.{ending}").read_bytes()


def test_bytes_do_not_depend_on_workers_or_chunks(corpus: Path, tiny_tokenizer: Path):
    runs = []
    for workers, chunk_bytes in ((1, 1 << 20), (1, 1), (2, 100), (3, 7000), (8, 1 << 20)):
        preprocess(config(corpus, tiny_tokenizer, workers=workers, chunk_bytes=chunk_bytes))
        runs.append(written(corpus.parent))
    assert len(runs[0]) == 2 and all(run == runs[0] for run in runs)


def test_workers_may_be_spawned(corpus: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    preprocess(config(corpus, tiny_tokenizer))
    forked = written(corpus.parent)
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "Process", spawn.Process)
    preprocess(config(corpus, tiny_tokenizer, workers=2, chunk_bytes=5000))
    assert written(corpus.parent) == forked


def test_several_files_follow_one_another(corpus: Path, tiny_tokenizer: Path, tmp_path: Path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "one more"}')
    settings = {"workers": 2, "chunk_bytes": 1000}
    preprocess(config(corpus, tiny_tokenizer, inputs=(str(more), str(corpus), str(more)), **settings))
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(more.read_bytes() + b"\n" + corpus.read_bytes() + more.read_bytes())
    preprocess(config(joined, tiny_tokenizer, output_prefix=str(tmp_path / "joined"), **settings))
    for ending in ("bin", "idx"):
        assert ((tmp_path / f"out_text_document.{ending}").read_bytes()
                == (tmp_path / f"joined_text_document.{ending}").read_bytes())


def test_every_key_becomes_a_dataset(corpus: Path, tiny_tokenizer: Path):
    summary = preprocess(
        config(corpus, tiny_tokenizer, json_keys=("title", "text"), workers=2, chunk_bytes=5000))
    both = written(corpus.parent)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    for dataset, texts in zip(summary.datasets, ([text[:9] for text in TEXTS], TEXTS)):
        ids = [i for text in texts for i in (library.encode(text) + [2] if text else [])]
        assert IndexedTokens(dataset.prefix).tokens.tolist() == ids
        assert (dataset.documents, dataset.tokens) == (len(TEXTS), len(ids))
        assert dataset.text_bytes == sum(len(text.encode()) for text in texts)
    preprocess(config(corpus, tiny_tokenizer))
    alone = written(corpus.parent, "out_text")
    assert alone == {name: content for name, content in both.items() if "text" in name}


def test_legacy_ends_documents_with_its_own_token(corpus: Path, tiny_tokenizer: Path):
    preprocess(config(corpus, tiny_tokenizer, legacy=True))
    tokens = IndexedTokens(corpus.with_name("out_text_document")).tokens
    assert tokens[-2:].tolist() == [2, 1002]
    assert read_manifest(corpus.with_name("out_text_document"))["tokenizer"]["eod_id"] == 1002


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path):
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "65536 3"}\n')
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=70_000)
    preprocess(PreprocessConfig(
        inputs=(str(path),), output_prefix=str(tmp_path / "out"), tokenizer=tokenizer))
    assert (tmp_path / "out_text_document.bin").read_bytes() == np.array([65536, 3], "<i4").tobytes()


def test_the_manifest_says_how_the_set_was_made(corpus: Path, tiny_tokenizer: Path):
    summary = preprocess(config(corpus, tiny_tokenizer))
    manifest = read_manifest(summary.datasets[0].prefix)
    assert manifest["tokenizer"] == {
        "type": "SentencePieceTokenizer", "vocab_size": 1000, "eod_id": 2,
        "fingerprint": hashlib.sha256(b"sentencepiece\0" + tiny_tokenizer.read_bytes()).hexdigest()}
    content = corpus.read_bytes()
    blocks = [content[at:at + 65536]  # the same blocks, found another way
              for at in sorted({max(0, len(content) - 65536) * k // 63 for k in range(64)})]
    digest = hashlib.sha256(str(len(content)).encode() + b"".join(blocks)).hexdigest()
    assert manifest["sources"] == [{"path": str(corpus), "size_bytes": len(content), "sample_sha256": digest}]
    assert manifest["rejected"] == {} and manifest["shard"] == "1/1" and manifest["seconds"] > 0
    assert manifest["append_eod"] is True and manifest["json_key"] == "text" and manifest["dtype"] == "uint16"
    assert manifest["documents"] == len(TEXTS)
    assert manifest["tokens"] == IndexedTokens(summary.datasets[0].prefix).n_tokens


def test_a_bad_line_late_in_a_file_leaves_nothing(corpus: Path, tiny_tokenizer: Path):
    with corpus.open("ab") as file:
        file.write(b'{"text": 7, "title": ""}\n')
    place = rf"corpus.jsonl, line {len(TEXTS) + 1} \(byte offset \d+\)"
    with pytest.raises(UserError, match=f"{place}: the value of 'text' is a number"):
        preprocess(config(corpus, tiny_tokenizer, json_keys=("title", "text"), workers=3, chunk_bytes=500))
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus.jsonl"]


def test_an_input_without_documents_is_refused(tmp_path: Path, tiny_tokenizer: Path):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="--input .*empty.jsonl: holds no document"):
        preprocess(config(path, tiny_tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_an_output_that_would_replace_an_input_is_refused(tmp_path: Path, tiny_tokenizer: Path):
    path = tmp_path / "out_text_document.json"
    path.write_text('{"text": "precious"}\n')
    with pytest.raises(UserError, match="is also an input and would be overwritten"):
        preprocess(config(path, tiny_tokenizer, output_prefix=str(tmp_path / "out")))
    assert path.read_text() == '{"text": "precious"}\n'
