"""Which lines are documents, and what is said of those that are none."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from megatron.pretrain.data.documents import (
    BadDocument, Source, cut_into_chunks, open_source, read_texts, reading)
from megatron.pretrain.errors import Interruption, UserError

GOOD = b'{"text": "first"}\n'


def texts_of(path: Path, keys=("text",), chunk_bytes: int = 16) -> list[list[str]]:
    columns: list[list[str]] = [[] for _ in keys]
    for chunk in cut_into_chunks(open_source(str(path)), chunk_bytes):
        for column, texts in zip(columns, read_texts(chunk, keys)):
            column += texts
    return columns


@pytest.mark.parametrize("line, byte, sentence", [
    (b'{"text": "a"', 12, r"is not valid JSON: Expecting ',' delimiter \(column 13\)"),
    (b'{"text": "a"} {}', 14, "is not valid JSON: Extra data"),
    (b"", 0, "is blank; every line must hold one JSON object"),
    (b"  \t", 0, "is blank"),
    (b'{"title": "a", "id": 1}', 0, "has no key 'text'; its keys: 'title', 'id'; --json-keys"),
    (b"{}", 0, "has no key 'text'; its keys: none"),
    (b'{"text": 7}', 0, "the value of 'text' is a number, not a string"),
    (b'{"text": true}', 0, "the value of 'text' is true or false, not a string"),
    (b'{"text": null}', 0, "the value of 'text' is null, not a string"),
    (b'{"text": ["a", "b"]}', 0, "the value of 'text' is a list, not a string"),
    (b'{"text": {"a": 1}}', 0, "the value of 'text' is an object, not a string"),
    (b'["text"]', 0, "holds a list where an object such as"),
    (b'"text"', 0, "holds a string where an object such as"),
    (b'{"text": "a\xffb"}', 11, "byte 0xff is not valid UTF-8"),
    (b'{"text": "a\xed\xa0\x80"}', 11, "byte 0xed is not valid UTF-8"),
    (b'{"text": "\xe6\xb1\x89\tb"}', 13, r"a raw control character \(0x09\) .* write it as \\u0009"),
    (b'{"text": "a\\ud800 b"}', 0, "the value of 'text' holds a lone surrogate"),
    (b'{"text": "\\udc00"}', 0, "the value of 'text' holds a lone surrogate"),
    (b'\xef\xbb\xbf{"text": "a"}', 0, "begins with a byte order mark"),
    (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "is nested too deeply"),
], ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else "")
def test_a_bad_line_is_named(line: bytes, byte: int, sentence: str, tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD + GOOD + line + b"\n" + GOOD)
    with pytest.raises(BadDocument) as raised:
        texts_of(path)
    message = str(raised.value.as_user_error())
    assert message.startswith(f"{path}, line 3 (byte offset {2 * len(GOOD) + byte}): ")
    assert re.search(sentence, message)


def test_the_first_bad_line_is_the_one_that_is_named(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD + b"[]\n" + b"{\n")
    with pytest.raises(BadDocument, match="holds a list"):
        texts_of(path, chunk_bytes=1000)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n", b"\n  ", b"\r\n"])
def test_a_last_line_may_be_blank(ending: bytes, tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD + b'{"text": "last"}' + ending)
    for chunk_bytes in (1, 18, 1000):
        assert texts_of(path, chunk_bytes=chunk_bytes) == [["first", "last"]]


@pytest.mark.parametrize("chunk_bytes", [1, 18, 1000])
def test_two_blank_lines_at_the_end_are_one_too_many(chunk_bytes: int, tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD + b"\n\n")
    with pytest.raises(BadDocument, match="is blank"):
        texts_of(path, chunk_bytes=chunk_bytes)


def test_what_megatron_reads_is_read(tmp_path: Path):
    """Python's json accepts these lines and orjson does not, or they look like an error and are none."""
    lines = ['{"text": "a", "score": NaN}', '{"text": "b", "n": 1e999}', '{"text": "c", "title": "\\ud800"}',
             '{"text": "\\ud83d\\ude42 e\\u2028f\x7f"}',
             '{"text": "x", "text": "last of two"}', '  {"text": ""}\r', '{"text": "g\u2028h"}']
    path = tmp_path / "corpus.jsonl"
    path.write_bytes("\n".join(lines).encode())
    assert texts_of(path) == [[json.loads(line)["text"] for line in lines]]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 40, 41, 10_000])
def test_chunks_are_whole_lines_and_cover_the_file(chunk_bytes: int, tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    content = b"".join(b"x" * (number % 9) + b"\n" for number in range(50)) + b"no newline"
    path.write_bytes(content)
    chunks = list(cut_into_chunks(Source(str(path), len(content)), chunk_bytes))
    pieces = [content[chunk.start_byte:chunk.start_byte + chunk.size_bytes] for chunk in chunks]
    assert b"".join(pieces) == content
    assert all(piece.endswith(b"\n") and len(piece) >= chunk_bytes for piece in pieces[:-1])
    assert [chunk.ends_file for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10)
    first, second = cut_into_chunks(open_source(str(path)), 70)
    os.truncate(path, second.start_byte)
    assert read_texts(first, ("text",)) == [["a"] * 5]
    with pytest.raises(UserError, match="corpus.jsonl: became shorter while it was read"):
        read_texts(second, ("text",))


@pytest.mark.parametrize("number, kind", [(errno.EIO, Interruption), (errno.EACCES, UserError)])
def test_an_input_that_cannot_be_read_for_once_is_an_interruption(number: int, kind: type[UserError]):
    with pytest.raises(UserError, match=f"--input far.jsonl: {os.strerror(number)}") as raised, reading("far.jsonl"):
        raise OSError(number, os.strerror(number))
    assert type(raised.value) is kind


def test_several_keys_give_a_column_each(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n{"b": "4", "a": "3"}\n')
    assert texts_of(path, ("b", "a")) == [["2", "4"], ["1", "3"]]


def test_an_input_that_is_no_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--input .*none.jsonl: No such file"):
        open_source(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="Is a directory; it must be a file of JSON lines"):
        open_source(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match=f"{path}: is a pipe or a device"):
            open_source(path)
