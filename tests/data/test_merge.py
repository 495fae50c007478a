"""Joined sets are what one run writes; sets that do not go together are named."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data import indexed
from megatron.pretrain.data.indexed import IndexedTokens, IndexedWriter, read_manifest
from megatron.pretrain.data.merge import merge_sets, merge_shards
from megatron.pretrain.errors import UserError

TOKENIZER = {"type": "t", "fingerprint": "f", "vocab_size": 9, "eod_id": 0}


def write(prefix: Path, documents: list[list[int]], dtype=np.uint16, manifest: dict | None = None) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_documents(np.array(ids, dtype), np.array([len(ids)]))
        writer.seal(manifest)
    return str(prefix)


def files(prefix: Path) -> bytes:
    return Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


PARTS = ([[1, 2], [], [3]], [], [[]], [[4, 5, 6]])


@pytest.mark.parametrize("in_the_kernel", [True, False])
def test_joined_sets_equal_one_and_the_engines(in_the_kernel: bool, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if not in_the_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    prefixes = [write(tmp_path / f"{number}", part) for number, part in enumerate(PARTS)]
    write(tmp_path / "one", sum(PARTS, []))
    merged = merge_sets([f"{prefixes[0]}.bin", *prefixes[1:]], str(tmp_path / "all"))
    assert files(tmp_path / "all") == files(tmp_path / "one")
    assert (merged.parts, merged.documents, merged.tokens) == (4, 5, 6)
    builder = IndexedDatasetBuilder(str(tmp_path / "engine.bin"), dtype=np.uint16)
    builder.add_index(prefixes[0])
    builder.add_index(prefixes[3])
    builder.finalize(str(tmp_path / "engine.idx"))
    merge_sets([prefixes[0], prefixes[3]], str(tmp_path / "two"))
    assert files(tmp_path / "two") == files(tmp_path / "engine")


def test_an_index_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(indexed, "BLOCK", 3)
    documents = [[number] * (number % 4) for number in range(25)]
    parts = [write(tmp_path / "a", documents[:11]), write(tmp_path / "b", documents[11:])]
    merge_sets(parts, str(tmp_path / "all"))
    monkeypatch.undo()
    write(tmp_path / "one", documents)
    assert files(tmp_path / "all") == files(tmp_path / "one")


def test_manifests_are_summed(tmp_path: Path):
    made = {"tokenizer": TOKENIZER, "append_eod": True, "dtype": "uint16", "json_key": "text", "seconds": 1.5}
    for name, rejected in (("a", {"x": 1}), ("b", {"x": 2, "y": 1})):
        write(tmp_path / name, [[1, 2]], manifest={
            **made, "sources": [{"path": name, "size_bytes": 5}], "text_bytes": 7, "rejected": rejected})
    merge_sets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all"))
    manifest = read_manifest(tmp_path / "all")
    assert manifest["tokenizer"] == TOKENIZER and manifest["json_key"] == "text"
    assert [source["path"] for source in manifest["sources"]] == ["a", "b"]
    assert manifest["rejected"] == {"x": 3, "y": 1}
    sums = [manifest[name] for name in ("documents", "tokens", "text_bytes", "seconds")]
    assert sums == [2, 4, 14, 3]


def test_what_does_not_go_together_is_named(tmp_path: Path):
    made = {"tokenizer": TOKENIZER}
    one = write(tmp_path / "one", [[1]], manifest=made)
    other = write(tmp_path / "other", [[1]], manifest={"tokenizer": {**TOKENIZER, "fingerprint": "g"}})
    plain = write(tmp_path / "plain", [[1]])
    wide = write(tmp_path / "wide", [[1]], np.int32)
    for prefixes, sentence in (
            ([one, other], "other.json: its tokenizer is"), ([one, plain], "plain.json: is missing"),
            ([plain, one], "plain.json: is missing"), ([plain, wide], "wide: holds int32 and .*plain uint16"),
            ([one, str(tmp_path / "none")], "none.idx: No such file")):
        with pytest.raises(UserError, match=sentence):
            merge_sets(prefixes, str(tmp_path / "all"))
    with pytest.raises(UserError, match="is also an input"):
        merge_sets([one], one)
    assert not list(tmp_path.glob("*all*")) and not list(tmp_path.glob(".*"))


def test_shards_must_all_be_there_and_alike(tmp_path: Path):
    prefix = str(tmp_path / "out")
    with pytest.raises(UserError, match="no shard .*out_00001-of-"):
        merge_shards(prefix)
    for number, source in ((1, "a"), (2, "b")):
        write(tmp_path / f"out_{number:05d}-of-00002_text_document", [[number]], manifest={
            "tokenizer": TOKENIZER, "shard": f"{number}/2", "sources": [{"path": source}]})
    with pytest.raises(UserError, match="00002-of-00002_text_document.json: its sources are not those of"):
        merge_shards(prefix)
    (tmp_path / "out_00001-of-00002_text_document.idx").unlink()
    with pytest.raises(UserError, match="out_00001-of-00002_text_document.idx: No such file"):
        merge_shards(prefix)
    write(tmp_path / "out_00001-of-00003_text_document", [[1]])
    with pytest.raises(UserError, match="there are shards of 00002 and of 00003"):
        merge_shards(prefix)
    assert not list(tmp_path.glob("out_text*"))


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path):
    one = write(tmp_path / "one", [[1] * 60_000])
    program = ("import sys; from megatron.pretrain.data.merge import merge_sets\n"
               "merge_sets(sys.argv[1:3], sys.argv[3])")
    outcome = subprocess.run(
        [sys.executable, "-c", program, one, one, str(tmp_path / "all")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert f"UserError: cannot write {tmp_path}/all.bin: File too large" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.bin", "one.idx"]


def test_the_tool(tmp_path: Path, run_tool):
    one, other = write(tmp_path / "one", [[1, 2]]), write(tmp_path / "other", [[3]])
    outcome = run_tool("tools/merge_datasets.py", "--input", one, other, "--output-prefix", tmp_path / "all",
                       env={"COLUMNS": "200"})
    assert outcome.returncode == 0, outcome.stderr
    assert IndexedTokens(tmp_path / "all").tokens.tolist() == [1, 2, 3]
    assert str(tmp_path / "all") in outcome.stdout
    outcome = run_tool("tools/merge_datasets.py", "--output-prefix", tmp_path / "none")
    assert outcome.returncode == 2 and outcome.stderr.startswith("error: --output-prefix ")
    assert outcome.stderr.count("\n") == 1
