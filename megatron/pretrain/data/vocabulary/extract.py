"""Plain text out of the files that documentation and source packages carry."""

from __future__ import annotations

import ast
import gzip
import json
import re
import struct
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

# Of a word list, one occurrence is written for this many counted; rarer words are left out.
COUNTS_PER_OCCURRENCE = 8
WORDS_PER_LINE = 20
# The pieces of two writing systems never join, so a mark between two words keeps them apart
# as a space would, without teaching pieces that begin with a space.
WORD_SEPARATOR = "、"


class _Page(HTMLParser):
    """The text of an HTML or DocBook page: one line a block, `pre` kept as it is."""

    HIDDEN = frozenset({"script", "style", "head", "nav"})
    INLINE = frozenset("a abbr acronym app b bdi cite citetitle code command em emphasis file filename font "
                       "gui guilabel guimenu guimenuitem guiseq i key keycap kbd link literal q s samp "
                       "small span strong sub sup sys term tt u ulink userinput var xref".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = self._preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        self._preformatted += tag == "pre"
        if tag not in self.INLINE:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag not in self.INLINE:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if self._parts[-1:] == ["\n"]:
                data = data.lstrip(" ")
        self._parts.append(data)

    def text(self) -> str:
        return "".join(self._parts)


def page(content: bytes) -> str:
    """The visible text of an HTML, DocBook or Mallard page."""
    parser = _Page()
    parser.feed(content.decode("utf-8"))
    parser.close()
    return parser.text()


# Requests whose arguments are words of the page; all other requests only lay it out.
_TEXT_REQUESTS = frozenset(
    "SH SS B I R BR RB BI IB IR RI SM SB IP HP TP Nd Nm Sh Ss Li Em Sy Dq Sq Pq".split())
_ROFF_ESCAPES = re.compile(
    r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[-+]?\d+|\*(?:\(..|\[[^]]*\]|.)|[&|^%/,:]|\".*)")
_ROFF_CHARACTERS = {
    "(em": "—", "(en": "–", "(bu": "•", "(co": "©", "(aq": "'", "(dq": '"', "(lq": "“", "(rq": "”",
    "(oq": "‘", "(cq": "’", "-": "-", "e": "\\", " ": " ", "~": " ", "'": "'", "`": "`"}


def manual_page(content: bytes) -> str:
    """The words of a manual page written in the man or mdoc macros of roff."""
    lines = []
    inside_definition = False
    for line in content.decode("utf-8").splitlines():
        if line.startswith((".de", ".ig")):
            inside_definition = True
        elif inside_definition:
            inside_definition = not line.startswith("..")
        elif line.startswith((".", "'")):
            request, _, arguments = line[1:].strip().partition(" ")
            if request in _TEXT_REQUESTS:
                lines.append(arguments.replace('"', ""))
        else:
            lines.append(line)
    return "\n".join(_without_roff_escapes(line) for line in lines)


def _without_roff_escapes(line: str) -> str:
    line = _ROFF_ESCAPES.sub("", line)
    return re.sub(r"\\(\(..|.)", lambda escape: _ROFF_CHARACTERS.get(escape[1], ""), line)


def catalogue(content: bytes) -> str:
    """The translations of a compiled gettext catalogue (.mo), one message after another.

    The layout is that of the GNU gettext manual, "The Format of GNU MO Files"; the first message,
    of the empty string, is the header and says nothing.
    """
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    n_messages, _, translations_at = struct.unpack_from(f"{order}3I", content, 8)
    messages = []
    for message in range(1, n_messages):
        length_bytes, at = struct.unpack_from(f"{order}2I", content, translations_at + 8 * message)
        messages.append(content[at:at + length_bytes].decode("utf-8").replace("\0", "\n"))
    return "\n".join(messages)


def docstrings(content: bytes) -> str:
    """The docstrings of a Python module and of everything in it."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(content)) if isinstance(node, documented))
    return "\n".join(filter(None, found))


def json_values(content: bytes) -> str:
    """Every string among the values of a JSON file (a table of messages, say)."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    return "\n".join(strings(json.loads(content)))


def word_list(content: bytes) -> str:
    """A list of `word count ...` lines as text in which each word stands count // 8 times.

    The n-th copy of every word that has one stands before the (n+1)-th of any, so no line repeats a word.
    """
    counted = [line.split()[:2] for line in content.decode("utf-8").splitlines()]
    copies = {word: int(count) // COUNTS_PER_OCCURRENCE for word, count in counted}
    words = []
    waiting = sorted(copies, key=copies.__getitem__, reverse=True)
    copy = 1
    while waiting:
        while waiting and copies[waiting[-1]] < copy:
            waiting.pop()
        words.extend(waiting)
        copy += 1
    return "\n".join(WORD_SEPARATOR.join(words[at:at + WORDS_PER_LINE])
                     for at in range(0, len(words), WORDS_PER_LINE))


def plain(content: bytes) -> str:
    """Text that is text already: prose, Markdown, reStructuredText, source code."""
    return content.decode("utf-8")


READERS: dict[str, Callable[[bytes], str]] = {
    "text": plain, "page": page, "man": manual_page, "catalogue": catalogue, "docstrings": docstrings,
    "json": json_values, "words": word_list}


def extract(path: Path, reader: str) -> str:
    """The text of the file at `path`, read as `reader` (a name in READERS); .gz and .dz are unpacked.

    Raises ValueError (UnicodeDecodeError and JSONDecodeError among them), SyntaxError or struct.error
    where the file is not what the reader reads.
    """
    content = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        content = gzip.decompress(content)
    return READERS[reader](content)
