"""What a worker does with a chunk: encode it, take bad lines out, and write it once its place is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.pretrain.data.documents import BadDocument, BadLine, Chunk, sift
from megatron.pretrain.data.encoded import Counts, EncodedTexts, count
from megatron.pretrain.data.encoders import Encoder
from megatron.pretrain.data.parts import Entries, PlacedWriter, WriterPosition


class Task(NamedTuple):
    """A chunk, the number of the span that it is of, and the bytes on the disk that it stands for."""

    span: int
    chunk: Chunk
    disk_bytes: int


@dataclass(frozen=True)
class Screened:
    """What a chunk's documents add to the sets, one entry a key, and its bad lines, in order."""

    counts: Sequence[Counts]
    bad_lines: Sequence[BadLine]

    @property
    def lines(self) -> int:
        """Lines of the chunk, but for a blank one at the end of a file."""
        return self.counts[0].documents + len(self.bad_lines)


class ChunkWork:
    """Encodes chunks with `encoder` and holds them until it is told where in the sets of `writers` they go.

    encoder, keys, writers: one set a key.
    """

    def __init__(self, encoder: Encoder, keys: Sequence[str], writers: Sequence[PlacedWriter]) -> None:
        self._encoder, self._keys, self._writers = encoder, keys, writers
        self._held: deque[Sequence[EncodedTexts]] = deque()

    def begin(self, task: Task) -> Screened:
        for writer in self._writers:
            writer.open()
        texts, bad_lines = self._screen(task.chunk)
        self._held.append(texts)
        return Screened([count(each) for each in texts], bad_lines)

    def finish(self, places: Sequence[WriterPosition]) -> None:
        """Write the chunk that has waited longest."""
        for writer, texts, at in zip(self._writers, self._held.popleft(), places):
            writer.write(Entries(*texts.entries(at.tokens, at.sequences)), at)

    def _screen(self, chunk: Chunk) -> tuple[Sequence[EncodedTexts], Sequence[BadLine]]:
        """The texts of the good lines, and the bad ones."""
        try:
            return self._encoder(chunk), ()
        except BadDocument:
            good, bad_lines = sift(chunk, self._keys)
            if not bad_lines:  # the encoder and the reader of lines disagree, which is a defect of ours
                raise
        return self._encoder(Chunk(chunk.path, 0, len(good), ends_file=False, data=good)), bad_lines
