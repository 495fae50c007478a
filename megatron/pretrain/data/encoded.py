"""What an encoder makes of a chunk, for one key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EncodedTexts:
    """One key's texts of a chunk: the tokens end to end, and how many each document has (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
