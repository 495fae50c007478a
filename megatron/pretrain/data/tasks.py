"""What a worker does with a chunk: encode it, and where lines are bad take them out or name the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.pretrain.data.documents import BadDocument, BadLine, Chunk, sift
from megatron.pretrain.data.encoders import EncodedTexts, Encoder


class Task(NamedTuple):
    """A chunk, the number of the span that it is of, and the bytes on the disk that it stands for."""

    span: int
    chunk: Chunk
    disk_bytes: int


@dataclass(frozen=True)
class Screened:
    """A chunk's documents, one entry a key, and its bad lines, in order."""

    texts: Sequence[EncodedTexts]
    bad_lines: Sequence[BadLine]

    @property
    def lines(self) -> int:
        """Lines of the chunk, but for a blank one at the end of a file."""
        return len(self.texts[0].lengths) + len(self.bad_lines)


@dataclass(frozen=True)
class Screen:
    """An encoder that gives bad lines back beside what it made of the good ones."""

    encoder: Encoder
    keys: tuple[str, ...]

    def __call__(self, task: Task) -> Screened:
        try:
            return Screened(self.encoder(task.chunk), ())
        except BadDocument:
            good, bad_lines = sift(task.chunk, self.keys)
            if not bad_lines:  # the encoder and the reader of lines disagree, which is a defect of ours
                raise
        chunk = Chunk(task.chunk.path, 0, len(good), ends_file=False, data=good)
        return Screened(self.encoder(chunk), bad_lines)
