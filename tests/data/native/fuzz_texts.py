"""Strings that look for trouble, and a run of as many as one likes:

    python tests/data/native/fuzz_texts.py --strings 1000000 MODEL...

The strings are shared out over the models. Each is encoded by the encoder that preprocessing would choose,
twice, and by SentencePiece; a difference is printed and makes the run fail.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import orjson
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.documents import Chunk
from megatron.pretrain.data.encoders import Encoder, choose_encoder
from megatron.pretrain.tokenizer import build_tokenizer

STRINGS_AT_ONCE = 5000


class Texts:
    """Pieces, repeated and cut ones, characters of every block of Unicode, controls, spaces, no pattern."""

    def __init__(self, model: Path, seed: int) -> None:
        library = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._pieces = [library.id_to_piece(number) for number in range(library.vocab_size())]
        self._random = random.Random(seed)

    def draw(self) -> str:
        kind = self._random.choice((self._pieces_in_a_row, self._one_piece_repeated, self._characters,
                                    self._spaces, self._cut_pieces, self._no_pattern))
        text = kind()
        return text if self._random.random() < 0.5 else text.replace("▁", " ")

    def _pieces_in_a_row(self) -> str:
        return "".join(self._random.choices(self._pieces, k=self._random.randint(1, 30)))

    def _one_piece_repeated(self) -> str:
        return self._random.choice(self._pieces) * self._random.randint(1, 60)

    def _characters(self) -> str:
        """Of all blocks but the surrogates, two neighbours from one block."""
        blocks = self._random.choices([*range(0xD8), *range(0xE0, 0x1100)], k=self._random.randint(1, 12))
        return "".join(chr(block << 8 | self._random.randrange(256)) for block in blocks for _ in range(2))

    def _spaces(self) -> str:
        return "".join(self._random.choices(" \t\n\r\0▁a é中的\x7f\x1f", k=self._random.randint(0, 100)))

    def _cut_pieces(self) -> str:
        parts = (self._random.choice(self._pieces) for _ in range(self._random.randint(1, 9)))
        return "".join(part[self._random.randint(0, 2):self._random.randint(1, 9)] for part in parts)

    def _no_pattern(self) -> str:
        return "".join(self._random.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789+/=._- ",
                                            k=self._random.randint(0, 300)))


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """The ids of each text by way of JSON lines, half of them in ASCII."""
    lines = b"".join((orjson.dumps(document) if number % 2 else json.dumps(document).encode()) + b"\n"
                     for number, document in enumerate({"text": text} for text in texts))
    [encoded] = encoder(Chunk("fuzz.jsonl", 0, len(lines), True, lines))
    assert encoded.text_bytes == sum(len(text.encode()) for text in texts)
    return [encoded.ids_of(number, encoded.length_of(number)) for number in range(encoded.documents)]


def differences(model: Path, strings: int, seed: int) -> int:
    """How many of the strings have other ids; prints what encoder ran and the first of them."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer",
                                                tokenizer_model=str(model)))
    encoder, said = choose_encoder(tokenizer, ("text",), False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = Texts(model, seed)
    different = 0
    for start in range(0, strings, STRINGS_AT_ONCE):
        drawn = [texts.draw() for _ in range(min(STRINGS_AT_ONCE, strings - start))]
        right = library.encode(drawn)
        for ours in (encode(encoder, drawn), encode(encoder, drawn)):  # merged, then from the caches
            wrong = [text for text, mine, theirs in zip(drawn, ours, right, strict=True) if mine != theirs]
            for text in wrong[:3]:
                print(f"DIFFERENT: {text!r}")
            different += len(wrong)
    print(f"{model}: {said}; {strings:,} strings, {different} differences", flush=True)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--strings", type=int, default=100_000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    each = -(-flags.strings // len(flags.models))
    found = [differences(model, each, flags.seed + number) for number, model in enumerate(flags.models)]
    sys.exit(any(found))


if __name__ == "__main__":
    main()
