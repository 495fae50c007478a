"""What --input may name, and what is said of what it may not."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest
import zstandard

from megatron.pretrain.data.documents import BadDocument, Chunk, read_texts
from megatron.pretrain.data.inputs import Input, open_inputs
from megatron.pretrain.data.streams import cut_stream
from megatron.pretrain.errors import UserError

LINES = b"".join(b'{"text": "%s"}\n' % (b"word " * (number % 50)) for number in range(400))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.json", "deep/c.ndjson", "deep/d.JSONL.gz", "e.json.zst"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    for name in (".hidden.jsonl", "notes.txt", "out_rejects.jsonl", "out_text_document.json",
                 "out_text_document.idx"):
        (tmp_path / name).write_bytes(b"{}")
    return tmp_path


def names(folder: Path, *words: str) -> list[str]:
    return [os.path.relpath(source.path, folder) for source in open_inputs(words)]


def test_a_folder_is_all_json_lines_under_it_in_order(folder: Path):
    assert names(folder, str(folder)) == [
        "a.json", "b.jsonl", "deep/c.ndjson", "deep/d.JSONL.gz", "e.json.zst"]


def test_a_glob_is_its_files_in_order(folder: Path):
    assert names(folder, f"{folder}/?.json*", f"{folder}/**/c*") == ["a.json", "b.jsonl", "e.json.zst",
                                                                    "deep/c.ndjson"]


def test_a_file_may_have_the_name_of_a_glob(folder: Path):
    (folder / "[x].jsonl").write_bytes(b"{}")
    assert names(folder, f"{folder}/[x].jsonl") == ["[x].jsonl"]


@pytest.mark.parametrize("word, sentence", [
    ("none.jsonl", "none.jsonl: No such file"), ("*.parquet", r"\*.parquet: matches no file"),
    ("empty", r"empty: is a folder without .jsonl, .json, .ndjson files \(plain or .gz or .zst\)")])
def test_what_names_nothing_is_refused(word: str, sentence: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--input .*{sentence}"):
        open_inputs([str(tmp_path / word)])


def test_standard_input_is_read_once():
    with pytest.raises(UserError, match="can be read only once"):
        open_inputs(["-", "-"])


def test_a_changed_file_has_another_fingerprint(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    fingerprints = set()
    for content in (b"x" * 10_000_000, b"x" * 9_999_999 + b"y", b"y" + b"x" * 9_999_999, b"x" * 9_999_999,
                    b""):
        path.write_bytes(content)
        fingerprints.add(open_inputs([str(path)])[0].sample_sha256)
    assert len(fingerprints) == 5


def pack(ending: str, content: bytes) -> bytes:
    return gzip.compress(content) if ending == ".gz" else zstandard.ZstdCompressor().compress(content)


def source_of(tmp_path: Path, ending: str, packed: bytes) -> Input:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed)
    return open_inputs([str(path)])[0]


def joined(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.read() for chunk in chunks)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
def test_compressed_lines_are_cut_as_plain_ones(ending: str, chunk_bytes: int, tmp_path: Path):
    parts = pack(ending, LINES[:5000]) + pack(ending, b"") + pack(ending, LINES[5000:])
    source = source_of(tmp_path, ending, parts)
    pairs = list(cut_stream(source, chunk_bytes, 0))
    chunks = [chunk for chunk, _ in pairs]
    assert joined(chunks) == LINES
    assert [chunk.start_byte for chunk in chunks] == [len(joined(chunks[:n])) for n in range(len(chunks))]
    assert all(chunk.data.endswith(b"\n") and chunk.size_bytes >= chunk_bytes for chunk in chunks[:-1])
    assert [chunk.ends_file for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(disk_bytes for _, disk_bytes in pairs) == source.size_bytes
    middle = chunks[len(chunks) // 2].start_byte
    assert joined([chunk for chunk, _ in cut_stream(source, chunk_bytes, middle)]) == LINES[middle:]


@pytest.mark.parametrize("chunk_bytes", [1, 1000])
def test_a_blank_last_line_and_no_last_line_end(chunk_bytes: int, tmp_path: Path):
    for content in (LINES + b"\n", LINES + b'{"text": "last"}'):
        source = source_of(tmp_path, ".gz", gzip.compress(content))
        texts = [text for chunk, _ in cut_stream(source, chunk_bytes, 0)
                 for text in read_texts(chunk, ["text"])[0]]
        assert len(texts) == 400 + (content[-1:] == b"}")


@pytest.mark.parametrize("ending, packed, sentence", [
    (".gz", pack(".gz", LINES)[:-10], "ends in the middle of its .gz stream; it is truncated"),
    (".gz", b"", "ends in the middle of its .gz stream"),
    (".gz", LINES, "cannot be unpacked near byte"),
    (".gz", pack(".gz", LINES) + b"garbage", "cannot be unpacked"),
    (".zst", pack(".zst", LINES)[:-10], "ends in the middle of its .zst stream; it is truncated"),
    (".zst", LINES, "cannot be unpacked near byte")])
def test_a_damaged_archive_is_a_sentence(ending: str, packed: bytes, sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"--input .*a.jsonl{ending}: {sentence}"):
        list(cut_stream(source_of(tmp_path, ending, packed), 1000, 0))


def test_padding_after_an_archive_is_no_damage(tmp_path: Path):
    source = source_of(tmp_path, ".gz", pack(".gz", LINES) + bytes(9000))
    assert joined([chunk for chunk, _ in cut_stream(source, 1000, 0)]) == LINES


def test_without_zstandard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        list(cut_stream(source_of(tmp_path, ".zst", b"x"), 1000, 0))


def test_a_bad_line_of_an_archive_is_placed_in_its_text(tmp_path: Path):
    source = source_of(tmp_path, ".gz", gzip.compress(LINES + b"{}\n"))
    with pytest.raises(BadDocument) as raised:
        for chunk, _ in cut_stream(source, 1000, 0):
            read_texts(chunk, ["text"])
    assert raised.value.fault_byte == len(LINES)
