"""JSON lines: cut files into chunks of whole lines, read the texts, and say where a line is bad.

A line is read as Megatron-LM reads it, but for two things that it would take and we refuse: a lone
surrogate, which is no character, and a list of strings. Megatron-LM makes each string a sequence of one
document, and its training then takes sequences for documents; here a document is one sequence.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron.pretrain.errors import Interruption, UserError

PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a network file system says for once."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KIND_OF_TYPE = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
                bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Source:
    """A file of JSON lines."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file: `size_bytes` bytes from `start_byte` on.

    data: these bytes, where they cannot be read at `start_byte` of `path`: the file is compressed or is
    standard input. Offsets then are those of the text as it was unpacked.
    """

    path: str
    start_byte: int
    size_bytes: int
    ends_file: bool
    data: bytes | None = None

    def read(self) -> bytes:
        """The lines."""
        if self.data is not None:
            return self.data
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.start_byte)
            data = file.read(self.size_bytes)
        if len(data) < self.size_bytes:
            raise UserError(f"--input {self.path}: became shorter while it was read; give a file that nobody writes")
        return data


class BadDocument(Exception):
    """A line that is no document: `path`, `fault_byte` (offset in the file), `reason`, and its `kind`.

    The kind is the same for all lines that are bad in one way; the reason names what is in this one.
    Whoever reads a chunk does not know the line's number; `as_user_error` counts it.
    """

    def __init__(self, path: str, fault_byte: int, reason: str, kind: str) -> None:
        super().__init__(path, fault_byte, reason, kind)
        self.path, self.fault_byte, self.reason, self.kind = path, fault_byte, reason, kind

    def as_user_error(self) -> UserError:
        """The sentence for the user, with the line's number, from 1, and the byte's offset, from 0."""
        line = 1 + count_lines(self.path, self.fault_byte)
        return UserError(f"{self.path}, line {line} (byte offset {self.fault_byte}): {self.reason}")


@dataclass(frozen=True)
class BadLine:
    """A line that `sift` took out: its number in the chunk, from 0, and its bytes without the line's end."""

    line: int
    raw: bytes
    error: BadDocument


class _Refusal(ValueError):
    """Why a line is no document; `at` is the byte of the line where that shows."""

    def __init__(self, kind: str, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.at = kind, reason, at


def count_lines(path: str, end_byte: int) -> int:
    """Line ends among the first `end_byte` bytes of a file."""
    with reading(path), open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(1 << 20, end_byte - file.tell())), b"")
        return sum(block.count(b"\n") for block in blocks)


def open_source(path: str) -> Source:
    """Check that `path` is a file we can read. Raises UserError otherwise."""
    with reading(path):
        status = os.stat(path)
    # Asked before it is opened: to open a pipe that nobody writes to is to wait for ever.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"--input {path}: is a pipe or a device; several processes read the input at once, "
                        "so it must be a regular file")
    with reading(path), open(path, "rb"):
        return Source(path, status.st_size)


def cut_into_chunks(source: Source, chunk_bytes: int, start: int = 0, end: int | None = None
                    ) -> Iterator[Chunk]:
    """The file in order, in chunks of at least `chunk_bytes` (but the last) that end with a line's end.

    `start` and `end`, where given, are places where a line begins.
    """
    end = source.size_bytes if end is None else end
    with reading(source.path), open(source.path, "rb") as file:
        while start < end:
            file.seek(start + chunk_bytes - 1)
            file.readline()
            stop = min(file.tell(), end)
            yield Chunk(source.path, start, stop - start, ends_file=stop == source.size_bytes)
            start = stop


def read_texts(chunk: Chunk, keys: Sequence[str]) -> list[list[str]]:
    """The texts of the chunk's documents in order, one list for each key.

    Raises BadDocument for the first line that is no document.
    """
    texts: list[list[str]] = [[] for _ in keys]
    start = chunk.start_byte
    for line in _lines(chunk):
        try:
            for column, text in zip(texts, _read_line(line, keys)):
                column.append(text)
        except _Refusal as why:
            raise BadDocument(chunk.path, start + why.at, why.reason, why.kind) from None
        start += len(line) + 1
    return texts


def sift(chunk: Chunk, keys: Sequence[str]) -> tuple[bytes, list[BadLine]]:
    """The lines of the chunk that are documents, end to end, and those that are none."""
    good, bad = [], []
    start = chunk.start_byte
    for number, line in enumerate(_lines(chunk)):
        try:
            _read_line(line, keys)
            good.append(line + b"\n")
        except _Refusal as why:
            error = BadDocument(chunk.path, start + why.at, why.reason, why.kind)
            bad.append(BadLine(number, line, error))
        start += len(line) + 1
    return b"".join(good), bad


def _lines(chunk: Chunk) -> list[bytes]:
    lines = chunk.read().split(b"\n")
    if not lines[-1]:  # what follows the last newline is no line
        lines.pop()
    if lines and chunk.ends_file and not lines[-1].strip():
        lines.pop()
    return lines


def _read_line(line: bytes, keys: Sequence[str]) -> list[str]:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        document = _read_slowly(line)
    return [_text_of(document, key) for key in keys]


def _text_of(document: Any, key: str) -> str:
    if not isinstance(document, dict):
        raise _Refusal("not an object", f"holds {KIND_OF_TYPE[type(document)]} where an object such as "
                       f'{{"{key}": "..."}} was expected')
    if key not in document:
        there = ", ".join(repr(name) for name in list(document)[:5]) or "none"
        raise _Refusal("key missing",
                       f"has no key {key!r}; its keys: {there}; --json-keys names the field of the text")
    text = document[key]
    if not isinstance(text, str):
        hint = "; join its parts, for a document is one text" if isinstance(text, list) else ""
        raise _Refusal("not a string",
                       f"the value of {key!r} is {KIND_OF_TYPE[type(text)]}, not a string{hint}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refusal("lone surrogate",
                       f"the value of {key!r} holds a lone surrogate (an escape from \\ud800 to \\udfff "
                       "without its partner), which is no character") from None
    return text


def _read_slowly(line: bytes) -> Any:
    """What the standard library makes of a line that orjson declines.

    It accepts what Megatron-LM accepts and orjson does not (NaN, numbers beyond a double, a lone surrogate
    in a field that is not read), and where it declines too it says at which character.
    """
    if not line.strip():
        raise _Refusal("blank line", "is blank; every line must hold one JSON object (the last line alone "
                       "may be blank)")
    if line.startswith(BYTE_ORDER_MARK):
        raise _Refusal("byte order mark", "begins with a byte order mark; save the file as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refusal("not UTF-8", f"byte 0x{line[error.start]:02x} is not valid UTF-8; save the file as "
                       "UTF-8", error.start) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _json_refusal(error, line, at=len(text[:error.pos].encode())) from None
    except RecursionError:
        raise _Refusal("nested too deeply", "is nested too deeply") from None
    except ValueError as error:
        raise _Refusal("not valid JSON", f"is not valid JSON: {error}") from None


def _json_refusal(error: json.JSONDecodeError, line: bytes, at: int) -> _Refusal:
    if error.msg == "Invalid control character at":
        return _Refusal("raw control character",
                        f"a raw control character (0x{line[at]:02x}) stands inside a string; "
                        f"write it as \\u{line[at]:04x}", at)
    return _Refusal("not valid JSON", f"is not valid JSON: {error.msg} (column {error.pos + 1})", at)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Say of an input that cannot be read what is wrong with it."""
    try:
        yield
    except OSError as error:
        kind = Interruption if error.errno in PASSING_ERRORS else UserError
        raise kind(f"--input {path}: {error.strerror}; it must be a file of JSON lines") from None
