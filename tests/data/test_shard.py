"""Shards together are the input: every line once, in order, wherever the cuts fall."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron.pretrain.data.inputs import open_inputs
from megatron.pretrain.data.shard import Shard, cut_into_spans, cut_into_tasks, parse_shard
from megatron.pretrain.errors import UserError


def lines_of(path: Path, sizes: list[int]) -> bytes:
    path.write_bytes(b"".join(b"%d" % (number % 10) * size + b"\n" for number, size in enumerate(sizes)))
    return path.read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_every_line_is_in_one_shard(count: int, tmp_path: Path):
    contents = [lines_of(tmp_path / "a.jsonl", [5, 0, 900, 3, 3, 3]),
                lines_of(tmp_path / "b.jsonl", [7] * 40),
                lines_of(tmp_path / "d.jsonl", [1])]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(contents[2]))
    names = ["a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl"]
    inputs = open_inputs([str(tmp_path / name) for name in names])
    read, sizes = b"", []
    for number in range(1, count + 1):
        tasks = list(cut_into_tasks(cut_into_spans(inputs, Shard(number, count)), 10, 0, 0))
        part = b"".join(task.chunk.read() for task in tasks)
        assert part == b"" or part.endswith(b"\n")
        sizes.append(len(part))
        read += part
    assert read == contents[0] + contents[1] + contents[2] + contents[2]
    if count == 2:
        assert abs(sizes[0] - sizes[1]) < 1000


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_what_is_no_shard_is_refused(text: str):
    with pytest.raises(UserError, match=f"--shard {text}: is none of N parts"):
        parse_shard(text)


def test_names_sort_in_the_order_of_the_shards():
    assert parse_shard("3/16") == Shard(3, 16)
    assert Shard(3, 16).prefix("out/corpus") == "out/corpus_00003-of-00016"
    assert Shard().prefix("out/corpus") == "out/corpus"
