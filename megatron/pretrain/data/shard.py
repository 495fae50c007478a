"""Which part of the input a run does: all of it, or one of N parts that together are all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.pretrain.data.documents import Source, cut_into_chunks, reading
from megatron.pretrain.data.inputs import Input
from megatron.pretrain.data.streams import cut_stream
from megatron.pretrain.data.tasks import Task
from megatron.pretrain.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def prefix(self, prefix: str) -> str:
        """Where the shard's files go: PREFIX where it is the only one, else PREFIX_00003-of-00016 or so."""
        return prefix if self.count == 1 else f"{prefix}_{self.number:05d}-of-{self.count:05d}"


def parse_shard(text: str) -> Shard:
    """'3/16' as a Shard. Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: is none of N parts; give I/N with I from 1 to N, such as 3/16")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Span:
    """Whole lines of one input: from `start_byte` up to `end_byte`, both on the disk."""

    input: Input
    start_byte: int
    end_byte: int

    @property
    def size_bytes(self) -> int:
        return self.end_byte - self.start_byte


def cut_into_spans(inputs: Sequence[Input], shard: Shard) -> list[Span]:
    """The shard's part of the inputs, in their order.

    The inputs' bytes are divided evenly; a line belongs to the shard in which it begins. A compressed
    file is not cut: all of it belongs to the shard in which it begins.
    """
    if shard.count > 1 and any(source.is_standard_input for source in inputs):
        raise UserError(f"--shard {shard}: standard input cannot be divided; give files")
    total_bytes = sum(source.size_bytes for source in inputs)
    begin, end = (total_bytes * number // shard.count for number in (shard.number - 1, shard.number))
    spans, before_bytes = [], 0
    for source in inputs:
        start, stop = (_line_start(source, cut - before_bytes) for cut in (begin, end))
        before_bytes += source.size_bytes
        if start < stop or shard.count == 1:
            spans.append(Span(source, start, stop))
    return spans


def _line_start(source: Input, place: int) -> int:
    """The first place at or after `place` where a line of the input begins, or its end."""
    if place <= 0:
        return 0
    if place >= source.size_bytes or source.is_stream:
        return source.size_bytes
    with reading(source.path), open(source.path, "rb") as file:
        file.seek(place - 1)
        file.readline()
        return min(file.tell(), source.size_bytes)


def cut_into_tasks(spans: Sequence[Span], chunk_bytes: int, first_span: int, from_byte: int
                   ) -> Iterator[Task]:
    """The chunks of the spans in order, from `from_byte` of span `first_span` on.

    `from_byte` is the end of a chunk, or 0 for the beginning of the span.
    """
    for number in range(first_span, len(spans)):
        span = spans[number]
        if span.input.is_stream:
            for chunk, disk_bytes in cut_stream(span.input, chunk_bytes, from_byte):
                yield Task(number, chunk, disk_bytes)
        else:
            source = Source(span.input.path, span.input.size_bytes)
            start = max(from_byte, span.start_byte)
            for chunk in cut_into_chunks(source, chunk_bytes, start, span.end_byte):
                yield Task(number, chunk, chunk.size_bytes)
        from_byte = 0
