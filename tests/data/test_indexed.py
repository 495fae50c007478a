"""Our files are megatron-core's, byte for byte; damaged ones are refused; a failed write leaves nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.indexed import (
    IndexedTokens, IndexedWriter, count_tokens, read_manifest, token_dtype, write_manifest)
from megatron.pretrain.errors import UserError

DOCUMENTS = ([5, 6, 7], [], [8], [65499, 0], [])


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16, manifest=None) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(np.array(sum(documents, []), dtype), np.array([len(ids) for ids in documents]))
        writer.seal(manifest)
    return prefix


def write_with_engine(prefix: Path, documents, dtype) -> None:
    """As Megatron-LM's tools/preprocess_data.py calls it: no sequence for a document without ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document([i for ids in sequences for i in ids], [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")


def same_files(one: Path, other: Path) -> bool:
    return all(Path(f"{one}{ending}").read_bytes() == Path(f"{other}{ending}").read_bytes()
               for ending in (".bin", ".idx"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("documents", [DOCUMENTS, ([],), ()], ids=["some empty", "only an empty one", "none"])
def test_bytes_equal_the_engines(documents, dtype, tmp_path: Path):
    write(tmp_path / "ours", documents, dtype)
    write_with_engine(tmp_path / "engine", [[ids] if ids else [] for ids in documents], dtype)
    assert same_files(tmp_path / "ours", tmp_path / "engine")


def test_a_document_of_several_sequences_equals_the_engines(tmp_path: Path):
    with IndexedWriter(tmp_path / "ours", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3], np.int64), [2, 1])
        writer.add_document(np.array([4]), [1])
    write_with_engine(tmp_path / "engine", [[[1, 2], [3]], [[4]]], np.uint16)
    assert same_files(tmp_path / "ours", tmp_path / "engine")


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 128256])
def test_dtype_is_the_engines(vocab_size: int):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_reading_gives_back_what_was_written(tmp_path: Path):
    tokens = IndexedTokens(f"{write(tmp_path / 'set')}.bin")
    assert tokens.prefix == str(tmp_path / "set")
    assert tokens.tokens.tolist() == [5, 6, 7, 8, 65499, 0]
    assert tokens.sequence_lengths.tolist() == [3, 1, 2]
    assert tokens.document_index.tolist() == [0, 1, 1, 2, 3, 3]
    assert (tokens.n_tokens, tokens.n_documents, tokens.dtype) == (6, 5, np.uint16)
    assert (tokens.sequence_lengths.dtype, tokens.document_index.dtype) == (np.int32, np.int64)


def test_a_set_without_tokens_can_be_read(tmp_path: Path):
    tokens = IndexedTokens(write(tmp_path / "set", ([], [])))
    assert (tokens.n_tokens, tokens.n_documents, len(tokens.tokens)) == (0, 2, 0)


def test_counting_reads_the_index_alone(tmp_path: Path):
    Path(f"{write(tmp_path / 'set')}.bin").unlink()
    assert count_tokens(tmp_path / "set") == 6


def damage_truncate(prefix: Path) -> None:
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:-1])


def damage_shorten_tokens(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(b"\0\0")


def damage_magic(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"something else that is long enough for a header")


def damage_version(prefix: Path) -> None:
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[9] = 2
    index.write_bytes(content)


def damage_documents(prefix: Path) -> None:
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:-8] + (9).to_bytes(8, "little"))


@pytest.mark.parametrize("damage, sentence", [
    (damage_truncate, "set.idx: is 109 bytes long where its header asks for 110"),
    (damage_shorten_tokens, "set.bin: is 2 bytes long where its .idx asks for 12"),
    (damage_magic, "set.idx: is no index"),
    (damage_version, "set.idx: version 2"),
    (damage_documents, "set.idx: its documents do not cover its 3 sequences"),
    (lambda prefix: Path(f"{prefix}.bin").unlink(), "set.bin: No such file"),
    (lambda prefix: Path(f"{prefix}.idx").unlink(), "set.idx: No such file"),
])
def test_damaged_files_are_refused(damage, sentence: str, tmp_path: Path):
    prefix = tmp_path / "set"
    write(prefix, DOCUMENTS[:4])
    damage(prefix)
    with pytest.raises(UserError, match=sentence):
        IndexedTokens(prefix)


def test_an_id_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "set", np.uint16)
    with pytest.raises(ValueError, match="do not fit uint16"), writer:
        writer.add_document(np.array([1, 65536]), [2])
    assert not list(tmp_path.iterdir())


def test_lengths_that_do_not_fill_the_ids_are_an_error(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "set", np.uint16)
    with pytest.raises(ValueError, match="2 ids do not fill"), writer:
        writer.add_document(np.array([1, 2]), [1])


def test_a_failed_write_keeps_the_older_set(tmp_path: Path):
    write(tmp_path / "set", manifest={"tokens": 6})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "set", np.int32) as writer:
        writer.add_document(np.array([1]), [1])
        writer.seal({})
        raise KeyboardInterrupt
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_older_set_is_replaced(tmp_path: Path):
    write(tmp_path / "set", manifest={"tokens": 6})
    write(tmp_path / "set", ([1],), np.int32, manifest={"tokens": 1})
    assert IndexedTokens(tmp_path / "set").tokens.tolist() == [1]
    assert read_manifest(tmp_path / "set")["tokens"] == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_that_cannot_be_taken_leaves_nothing_half_published(tmp_path: Path):
    (tmp_path / "set.idx").mkdir()
    with pytest.raises(UserError, match="cannot write .*set.idx: Is a directory"):
        write(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set.idx"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot write .*none/set.bin: No such file"):
        write(tmp_path / "none" / "set")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path):
    program = (
        "import numpy as np, sys; from megatron.pretrain.data.indexed import IndexedWriter\n"
        "with IndexedWriter(sys.argv[1], np.uint16) as writer:\n"
        "    for _ in range(100): writer.add_documents(np.ones(1000, np.uint16), np.array([1000]))\n")
    outcome = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert f"UserError: cannot write {tmp_path}/set.bin" in outcome.stderr
    assert "File too large" in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_manifest(tmp_path: Path):
    assert read_manifest(tmp_path / "set") is None
    write_manifest(tmp_path / "set", {"tokens": 3, "key": "汉"})
    assert read_manifest(f"{tmp_path / 'set'}.idx") == {"format": 1, "tokens": 3, "key": "汉"}
    assert [path.name for path in tmp_path.iterdir()] == ["set.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}'])
def test_a_file_that_is_no_manifest_is_refused(content: str, tmp_path: Path):
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(UserError, match="set.json: stands where the set's manifest would"):
        read_manifest(tmp_path / "set")
