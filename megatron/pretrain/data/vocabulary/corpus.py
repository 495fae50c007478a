"""The text a tokenizer is learnt from: gathered from packages, or the user's own; cut into sentences."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron.pretrain.data.documents import BadDocument, cut_into_chunks, open_source, read_texts
from megatron.pretrain.data.vocabulary.extract import extract
from megatron.pretrain.data.vocabulary.recipe import Package, Selection
from megatron.pretrain.errors import UserError

CHUNK_BYTES = 1 << 24
# Manuals of one project share whole paragraphs, which say nothing twice; short lines repeat because the
# language does (`return x`, "确定"), and how often they do is what a tokenizer learns.
REPEATED_LINE_BYTES = 40
DOCUMENT_BYTES = 1 << 16
KEY = "text"


def documents(path: str, json_key: str) -> Iterator[str]:
    """The documents of a file: the field `json_key` of each line of a .json or .jsonl, or a text's lines.

    Raises UserError naming the file and line that is no document.
    """
    source = open_source(path)
    if not path.endswith((".json", ".jsonl")):
        yield from _lines_of_text(path)
        return
    try:
        for chunk in cut_into_chunks(source, CHUNK_BYTES):
            yield from read_texts(chunk, [json_key])[0]
    except BadDocument as bad:
        raise bad.as_user_error() from None


def _lines_of_text(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: byte 0x{line[error.start]:02x} is not valid UTF-8; "
                                "save the file as UTF-8") from None


def sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The lines of the texts that are not blank; one of more than `max_bytes` of UTF-8 comes in parts.

    SentencePiece would leave a longer line out without a word. A part ends after the last space that
    fits, or where there is none with the last character that does.
    """
    for text in texts:
        for line in text.splitlines():
            if not line.strip():
                continue
            yield from _parts(line, max_bytes) if len(line) * 4 > max_bytes else (line,)


def _parts(line: str, max_bytes: int) -> Iterator[str]:
    rest = line.encode("utf-8")
    while len(rest) > max_bytes:
        end = rest.rfind(b" ", 0, max_bytes + 1)
        if end < 1:
            end = max_bytes
            while rest[end] & 0xC0 == 0x80:  # the middle of a character
                end -= 1
        yield rest[:end].decode("utf-8")
        rest = rest[end:]
    yield rest.decode("utf-8")


@dataclass
class Tally:
    """What came of one package in one group."""

    package: str
    group: str
    files: int = 0
    unreadable_files: int = 0
    training_bytes: int = 0
    held_out_bytes: int = 0


def gather(packages: Sequence[tuple[Package, Path]], folder: Path, held_out_percent: float) -> list[Tally]:
    """Write `folder`/GROUP.jsonl and `folder`/GROUP.held_out.jsonl from packages and where they lie unpacked.

    Each file is a document, or several where it is long. Which are held out their names decide, so the
    next run holds out the same. A long line that one document had is left out of all that follow, so
    none is both learnt from and held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = {selection.group for package, _ in packages for selection in package.selections}
    names = {(group, held_out): folder / (f"{group}.held_out.jsonl" if held_out else f"{group}.jsonl")
             for group in groups for held_out in (False, True)}
    seen: set[int] = set()
    tallies = []
    with ExitStack() as stack:
        files = {key: stack.enter_context(open(f"{path}.tmp", "wb")) for key, path in names.items()}
        for package, unpacked in packages:
            for selection in package.selections:
                tally = Tally(package.name, selection.group)
                for name, text in _selected(unpacked, selection, tally):
                    # The repeats of a word list are its meaning, and it is no prose to measure on.
                    counted = selection.reader == "words"
                    text = text if counted else without_repeats(text, seen)
                    held_out = not counted and _draw(f"{package.name}/{name}") < held_out_percent
                    size_bytes = len(text.encode("utf-8"))
                    if not size_bytes:
                        continue
                    files[selection.group, held_out].write(orjson.dumps(
                        {KEY: text, "package": package.name, "file": name}, option=orjson.OPT_APPEND_NEWLINE))
                    tally.held_out_bytes += size_bytes * held_out
                    tally.training_bytes += size_bytes * (not held_out)
                    if selection.max_mb and tally.training_bytes >= selection.max_mb * 1e6:
                        break
                tallies.append(tally)
    for path in names.values():
        os.replace(f"{path}.tmp", path)
    return tallies


def _selected(unpacked: Path, selection: Selection, tally: Tally) -> Iterator[tuple[str, str]]:
    """The name below `unpacked` and the text of each file of a selection, in the order of their draws."""
    found = {path.relative_to(unpacked).as_posix(): path for pattern in selection.files
             for path in unpacked.glob(pattern) if path.is_file() and not path.is_symlink()}
    if not found:
        raise UserError(f"package {tally.package}: no file matches {', '.join(selection.files)}")
    keep = re.compile(selection.keep) if selection.keep else None
    for name in sorted(found, key=lambda name: (_draw(name), name)):
        tally.files += 1
        try:
            text = extract(found[name], selection.reader)
        except (ValueError, SyntaxError, struct.error):
            tally.unreadable_files += 1
            continue
        if keep:
            text = "\n".join(match[1] for match in map(keep.search, text.splitlines()) if match)
        for part, at in enumerate(range(0, len(text), DOCUMENT_BYTES)):
            yield f"{name}#{part}", text[at:at + DOCUMENT_BYTES]


def _draw(name: str) -> float:
    """A number from 0 to 100 that depends on the name alone."""
    return zlib.crc32(name.encode("utf-8")) / 2**32 * 100


def without_repeats(text: str, seen: set[int]) -> str:
    lines = []
    for line in text.splitlines():
        long = len(line.encode("utf-8")) >= REPEATED_LINE_BYTES
        if long and hash(line) in seen:
            continue
        if long:
            seen.add(hash(line))
        lines.append(line.rstrip())
    return "\n".join(lines).strip("\n")
