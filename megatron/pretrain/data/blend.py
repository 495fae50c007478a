"""What --data-path says: datasets, with their weights if they have any."""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.pretrain.errors import UserError


@dataclass(frozen=True)
class Blended:
    """One dataset of a --data-path, with its weight if the blend has weights."""

    prefix: str
    weight: float | None


def parse_blend(tokens: Sequence[str]) -> list[Blended]:
    """Read the words of --data-path: one prefix, several, or pairs of weight and prefix.

    All of it may be base64 instead: it counts as that only if its plain form names no dataset and its
    decoding does. Raises UserError for no words, and for weights that are not all there and above 0.
    """
    words = plain_words(tokens)
    if not words:
        raise UserError("--data-path: empty; give a dataset's prefix, several, or pairs of weight and prefix")
    numbers = [_number(word) for word in words]
    weighted = len(words) > 1 and numbers[0] is not None
    if not weighted:
        stray = [word for word, number in zip(words[1:], numbers[1:], strict=True) if number is not None]
        if stray:
            raise UserError(f"--data-path: {stray[0]!r} is a weight, but {words[0]!r} has none; "
                            "give every dataset a weight before it, or none at all")
        return [Blended(word, None) for word in words]
    if len(words) % 2:
        raise UserError(f"--data-path: {len(words)} words are not pairs of weight and prefix; "
                        f"the last is {words[-1]!r}")
    for word, number in zip(words[::2], numbers[::2], strict=True):
        if number is None or not 0 < number < math.inf:
            raise UserError(f"--data-path: {word!r} stands where a weight above 0 was expected")
    return [Blended(prefix, weight) for prefix, weight in zip(words[1::2], numbers[::2], strict=True)]


def is_dataset(prefix: str) -> bool:
    """Whether PREFIX.idx is there; its content is not looked at."""
    return os.path.isfile(f"{prefix}.idx")


def plain_words(tokens: Sequence[str]) -> list[str]:
    """The words of a --data-path, decoded if they are base64 (see `parse_blend`)."""
    words = " ".join(tokens).split()
    if not any(is_dataset(word) for word in words):
        decoded = _from_base64(words)
        if any(is_dataset(word) for word in decoded):
            return decoded
    return words


def _from_base64(lines: Sequence[str]) -> list[str]:
    # The base64 command wraps its output, so the words may be the lines of one encoding.
    try:
        return base64.b64decode("".join(lines), validate=True).decode("utf-8").split()
    except (binascii.Error, UnicodeDecodeError):
        return []


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
