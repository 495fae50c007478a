"""A corpus out of the running Python's own standard library: real text, nothing downloaded.

Writes three JSON-lines files, one document a line with its text under `text`:

    stdlib_code.jsonl   the modules' source
    stdlib_docs.jsonl   the language reference that `pydoc` carries, and each module's docstrings
    heldout.jsonl       both kinds, of modules that neither of the other files has anything of

The same Python and the same --megabytes give the same files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import orjson

from megatron.pretrain.errors import UserError, entry

# What is installed beside the library, its tests (most of its bytes), data written as Python (tables of
# character sets, and pydoc's topics, which are the documents' part), and programs that many machines lack.
LEFT_OUT = {"site-packages", "dist-packages", "ensurepip", "test", "tests", "idle_test", "encodings",
            "pydoc_data", "lib2to3", "idlelib", "turtledemo", "tkinter", "distutils"}
HELD_OUT_OF = 16    # one top-level module in so many


@dataclass(frozen=True)
class Document:
    """One line of the corpus; `group` is the top-level module it belongs to."""

    text: str
    source: str
    group: str


def draw(name: str) -> int:
    """A number that looks random and is always the same for a name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def is_held_out(group: str) -> bool:
    """Whole modules are held out: a module's docstrings never train what its source is to test."""
    return draw(group) % HELD_OUT_OF == 0


def module_sources(library: Path) -> Iterator[Document]:
    """Every module of the standard library, in the order of its path."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT & set(place.parts) or place.name.startswith("_sysconfigdata"):
            continue
        with tokenize.open(path) as file:    # honours the encoding that the source declares
            text = file.read()
        if text.strip():
            yield Document(text, str(place), place.parts[0].removesuffix(".py"))


def described(node: ast.AST, indent: str = "") -> Iterator[str]:
    """The docstrings under a module or class, each below the name and arguments of what it describes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(child)
        if docstring:
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            body = "\n".join(f"{indent}    {line}".rstrip() for line in docstring.splitlines())
            yield f"{indent}{child.name}{arguments}\n{body}\n"
        if isinstance(child, ast.ClassDef):
            yield from described(child, indent + "    ")


def manual_page(module: Document) -> Document | None:
    """What a module says of itself, or nothing if it says nothing."""
    tree = ast.parse(module.text, module.source)
    parts = [ast.get_docstring(tree) or "", *described(tree)]
    text = "\n".join(part for part in parts if part)
    return Document(text, f"docstrings of {module.source}", module.group) if text else None


def reference_topics() -> Iterator[Document]:
    """The language reference's sections, all for training: some repeat parts of others."""
    for name, text in sorted(topics.items()):
        yield Document(text, f"topic {name}", "language reference")


def some_groups(sources: Iterable[Document], size_bytes: float) -> set[str]:
    """Top-level modules, drawn until their sources fill `size_bytes`."""
    bytes_of: defaultdict[str, int] = defaultdict(int)
    for module in sources:
        bytes_of[module.group] += len(module.text.encode())
    chosen: set[str] = set()
    for group in sorted(bytes_of, key=draw):
        if size_bytes <= 0:
            break
        chosen.add(group)
        size_bytes -= bytes_of[group]
    return chosen


def write_lines(path: Path, documents: Iterable[Document]) -> None:
    """Write the documents, under a temporary name until all are there; prints how many and how large."""
    unfinished = path.with_name(path.name + ".tmp")
    count = 0
    with unfinished.open("wb") as file:
        for count, document in enumerate(documents, 1):
            file.write(orjson.dumps({"text": document.text, "source": document.source}) + b"\n")
    os.replace(unfinished, path)
    print(f"{path}: {count} documents, {path.stat().st_size / 1e6:.2f} MB")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    parser.add_argument("--megabytes", type=float, default=float("inf"), metavar="N",
                        help="about so much source for training, of whole modules (default: all there is)")
    options = parser.parse_args(arguments)
    library = Path(sysconfig.get_path("stdlib"))
    sources = list(module_sources(library))
    if not sources:
        raise UserError(f"{library} holds no Python source: use a Python that ships its standard library")
    pages = list(filter(None, map(manual_page, sources)))
    held_out = [one for one in [*sources, *pages] if is_held_out(one.group)]
    training = [one for one in sources if not is_held_out(one.group)]
    chosen = some_groups(training, options.megabytes * 1e6)
    options.output.mkdir(parents=True, exist_ok=True)
    write_lines(options.output / "stdlib_code.jsonl", (one for one in training if one.group in chosen))
    write_lines(options.output / "stdlib_docs.jsonl",
                [*reference_topics(), *(one for one in pages if one.group in chosen)])
    # Drawn, so that its beginning is a fair sample of the whole.
    write_lines(options.output / "heldout.jsonl", sorted(held_out, key=lambda one: draw(one.source)))


if __name__ == "__main__":
    entry(main)
