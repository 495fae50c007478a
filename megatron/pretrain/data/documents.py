"""JSON lines: cut files into chunks of whole lines, read the texts, and say where a line is bad."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from megatron.pretrain.errors import UserError

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
    """Whole lines of one file: `size_bytes` bytes from `start_byte` on."""

    path: str
    start_byte: int
    size_bytes: int
    ends_file: bool


class BadDocument(Exception):
    """A line that is no document: `path`, `fault_byte` (offset in the file) and `reason`.

    Whoever reads a chunk does not know the line's number; `as_user_error` counts it.
    """

    def __init__(self, path: str, fault_byte: int, reason: str) -> None:
        super().__init__(path, fault_byte, reason)
        self.path, self.fault_byte, self.reason = path, fault_byte, reason

    def as_user_error(self) -> UserError:
        """The sentence for the user, with the line's number, from 1, and the byte's offset, from 0."""
        with _reading(self.path), open(self.path, "rb") as file:
            blocks = iter(lambda: file.read(min(1 << 20, self.fault_byte - file.tell())), b"")
            line = 1 + sum(block.count(b"\n") for block in blocks)
        return UserError(f"{self.path}, line {line} (byte offset {self.fault_byte}): {self.reason}")


def open_source(path: str) -> Source:
    """Check that `path` is a file we can read. Raises UserError otherwise."""
    with _reading(path):
        status = os.stat(path)
    # Asked before it is opened: to open a pipe that nobody writes to is to wait for ever.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"--input {path}: is a pipe or a device; several processes read the input at once, "
                        "so it must be a regular file")
    with _reading(path), open(path, "rb"):
        return Source(path, status.st_size)


def cut_into_chunks(source: Source, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in order, in chunks of at least `chunk_bytes` (but the last) that end with a line's end."""
    start = 0
    with _reading(source.path), open(source.path, "rb") as file:
        while start < source.size_bytes:
            file.seek(start + chunk_bytes - 1)
            file.readline()
            end = min(file.tell(), source.size_bytes)
            yield Chunk(source.path, start, end - start, ends_file=end == source.size_bytes)
            start = end


def read_texts(chunk: Chunk, keys: Sequence[str]) -> list[list[str]]:
    """The texts of the chunk's documents in order, one list for each key.

    Raises BadDocument for the first line that is no document.
    """
    texts: list[list[str]] = [[] for _ in keys]
    start = chunk.start_byte
    for line in _lines(chunk):
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError:
            document = _read_slowly(line, chunk.path, start)
        try:
            for column, key in zip(texts, keys):
                column.append(_text_of(document, key))
        except ValueError as error:
            raise BadDocument(chunk.path, start, str(error)) from None
        start += len(line) + 1
    return texts


def _lines(chunk: Chunk) -> list[bytes]:
    with _reading(chunk.path), open(chunk.path, "rb") as file:
        file.seek(chunk.start_byte)
        lines = file.read(chunk.size_bytes).split(b"\n")
    if not lines[-1]:  # what follows the last newline is no line
        lines.pop()
    if lines and chunk.ends_file and not lines[-1].strip():
        lines.pop()
    return lines


def _text_of(document: Any, key: str) -> str:
    if not isinstance(document, dict):
        raise ValueError(f"holds {KIND_OF_TYPE[type(document)]} where an object such as "
                         f'{{"{key}": "..."}} was expected')
    if key not in document:
        there = ", ".join(repr(name) for name in list(document)[:5]) or "none"
        raise ValueError(f"has no key {key!r}; its keys: {there}; --json-keys names the field of the text")
    text = document[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} is {KIND_OF_TYPE[type(text)]}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the value of {key!r} holds a lone surrogate (an escape from \\ud800 to \\udfff "
                         "without its partner), which is no character") from None
    return text


def _read_slowly(line: bytes, path: str, start: int) -> Any:
    """What the standard library makes of a line that orjson declines.

    It accepts what Megatron-LM accepts and orjson does not (NaN, numbers beyond a double, a lone surrogate
    in a field that is not read), and where it declines too it says at which character.
    """
    def bad(reason: str, at: int = 0) -> NoReturn:
        raise BadDocument(path, start + at, reason) from None

    if not line.strip():
        bad("is blank; every line must hold one JSON object (the last line alone may be blank)")
    if line.startswith(BYTE_ORDER_MARK):
        bad("begins with a byte order mark; save the file as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad(f"byte 0x{line[error.start]:02x} is not valid UTF-8; save the file as UTF-8", error.start)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = len(text[:error.pos].encode())
        if error.msg == "Invalid control character at":
            bad(f"a raw control character (0x{line[at]:02x}) stands inside a string; "
                f"write it as \\u{line[at]:04x}", at)
        bad(f"is not valid JSON: {error.msg} (column {error.pos + 1})", at)
    except RecursionError:
        bad("is nested too deeply")
    except ValueError as error:
        bad(f"is not valid JSON: {error}")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}; it must be a file of JSON lines") from None
