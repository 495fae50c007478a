"""The five corpora of the preprocessing benchmark, made on the spot and the same each time on one machine."""

from __future__ import annotations

import base64
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

SEED = 1
TEXT_ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".c", ".cpp", ".html", ".json", ".js", ".css")
LARGEST_FILE_BYTES = 1 << 20
CHINESE_STOPS = "，，，，，，。。。：；、、！？"


def docs_and_code(size_bytes: int) -> Iterator[str]:
    """The texts of the running Python's standard library and packages, each file once, in mixed order."""
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    paths = dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*"))
                          if path.suffix in TEXT_ENDINGS)
    yield from _until(size_bytes, _texts(random.Random(SEED).sample(list(paths), len(paths))))


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file() and path.stat().st_size <= LARGEST_FILE_BYTES:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # Latin-1 of old tests of codecs: no text in the sense of this corpus
                continue


def one_huge_line(size_bytes: int) -> Iterator[str]:
    """All of it one document."""
    yield "\n".join(docs_and_code(size_bytes))


def tiny_documents(size_bytes: int) -> Iterator[str]:
    """Documents of about 60 bytes: the lines of docs and code, cut or joined to that length."""
    for text in docs_and_code(4 * size_bytes):
        words = " ".join(text.split())
        tiny = (words[at:at + 60] for at in range(0, len(words), 60))
        for part in tiny:
            yield part
            size_bytes -= len(part.encode())
        if size_bytes <= 0:
            return


def chinese(size_bytes: int, model: str) -> Iterator[str]:
    """The tokenizer's Chinese pieces strung together, the n-th as often as 1 / n, with punctuation.

    No Chinese prose is installed with Python. The pieces are those of real text, their neighbours are
    not: give the benchmark a file of real documents where one is at hand (--chinese).
    """
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = [piece for piece in map(library.id_to_piece, range(library.vocab_size()))
              if piece and all("一" <= character <= "鿿" for character in piece)]
    weights = [1 / (rank + 2.7) for rank in range(len(pieces))]
    draw = random.Random(SEED)

    def document() -> str:
        sentence_pieces = draw.choices(pieces, weights, k=draw.randint(40, 1200))
        return "".join(piece + (draw.choice(CHINESE_STOPS) if draw.random() < 0.12 else "")
                       for piece in sentence_pieces)

    yield from _until(size_bytes, iter(document, None))


def given(size_bytes: int, path: str) -> Iterator[str]:
    """Documents of a file of JSON lines, under "text"."""
    with open(path, "rb") as lines:
        yield from _until(size_bytes, (orjson.loads(line)["text"] for line in lines))


def random_base64(size_bytes: int) -> Iterator[str]:
    """Nothing that was seen before: documents of 3,000 characters that no cache can know."""
    draw = random.Random(SEED)
    yield from _until(size_bytes, iter(lambda: base64.b64encode(draw.randbytes(2250)).decode(), None))


def _until(size_bytes: int, texts: Iterator[str]) -> Iterator[str]:
    """The first texts that together are `size_bytes` of UTF-8."""
    for text in texts:
        yield text
        size_bytes -= len(text.encode())
        if size_bytes <= 0:
            return


def write(path: Path, texts: Iterator[str]) -> int:
    """Write a file of JSON lines; returns its size in bytes."""
    with open(path, "wb") as file:
        for text in texts:
            file.write(orjson.dumps({"text": text}) + b"\n")
        return file.tell()
