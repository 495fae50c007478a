"""What a run of preprocessing writes: whole at its end, resumable when interrupted, gone when it fails."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.pretrain.data.documents import BadLine, count_lines
from megatron.pretrain.data.journal import (
    Interrupted, Journal, RunPosition, check_settings, read_journal)
from megatron.pretrain.data.parts import SECTIONS, SetWriter, TokenFormat, WriterPosition
from megatron.pretrain.data.rejects import as_record
from megatron.pretrain.data.shard import Span
from megatron.pretrain.data.staging import StagedFiles, part_name, reclaim, writing
from megatron.pretrain.data.tasks import Screened, Task
from megatron.pretrain.errors import Interruption, UserError

SECONDS_BETWEEN_COMMITS = 5.0
"""What a power failure or SIGKILL costs at most; other interruptions cost the chunks in work alone."""

HOW_TO_RESUME = "what is done is kept, and the same command with --resume goes on from there"


def set_prefixes(prefix: str, keys: Sequence[str]) -> list[str]:
    """Of the sets of a run, one a key."""
    return [f"{prefix}_{key}_document" for key in keys]


class RunOutput:
    """Token sets, one a key, rejected lines, and the journal; a context manager around the work.

    The workers write the tokens and the index, each chunk at the place that `place` gives it; what an ended
    run's workers may still write after it are the bytes that a run which goes on writes there, too.

    Leaving the block by Ctrl-C, a signal or an `Interruption` (the loss of a worker, an input that cannot be read
    for once) keeps hidden parts that `resume` goes on from; leaving it by any other exception removes them. So does
    a full disk: its space is others' too. Whatever happens before the block is entered leaves such parts as they are.

    Args:
        prefix: of all files.
        spans: what is read, in order.
        keys: a set for each.
        format: of the tokens.
        settings: everything the output follows from; to resume, it must be as it was.
        skip: write rejected lines to PREFIX_rejects.jsonl; otherwise the first raises UserError.
        resume: go on from what an interrupted run left, if there is any.
        resumable: whether the input can be read again.
    """

    def __init__(self, prefix: str, spans: Sequence[Span], keys: Sequence[str], format: TokenFormat,
                 settings: Mapping[str, Any], *, skip: bool, resume: bool, resumable: bool) -> None:
        self._spans, self._resumable = spans, resumable
        self._lines_before: dict[int, int] = {}
        self._started = self._committed = time.monotonic()
        prefixes = set_prefixes(prefix, keys)
        self.rejects_path = f"{prefix}_rejects.jsonl" if skip else None
        endings = (".bin", ".json", ".idx", *SECTIONS)
        files = [*(f"{each}{ending}" for each in prefixes for ending in endings),
                 *filter(None, [self.rejects_path])]
        left = read_journal(prefix, len(prefixes))
        if resume and left:
            check_settings(left, settings, prefix)
        self._staging = StagedFiles()
        try:
            # Before anything else of that run is touched: the journal is also the lock.
            self._journal = Journal(self._staging, prefix, settings, files, left if resume else None)
            self.position = self._take_over(left, resume, len(prefixes))
            self.writers = [SetWriter(each, format, staging=self._staging, resume_at=at)
                            for each, at in zip(prefixes, self.position.sets)]
            self._rejects = (self._staging.create(self.rejects_path, self.position.rejects_bytes)
                             if self.rejects_path else None)
        except BaseException:
            if left and resume:
                self._staging.keep()
            else:
                self._staging.discard()
            raise
        self.resumed_at = self._placed = self.position
        self._unwritten: deque[RunPosition] = deque()

    def _take_over(self, left: Interrupted | None, resume: bool, keys: int) -> RunPosition:
        """The place to go on from; without `resume`, what an interrupted run left goes."""
        if left and resume:
            if left.publishing:
                for final in left.files:
                    reclaim(final)
            return left.position
        for name in left.files if left else ():
            with contextlib.suppress(FileNotFoundError):
                os.remove(part_name(name))
        return RunPosition.start(keys)

    def __enter__(self) -> RunOutput:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or self._staging.is_published:
            return
        if not self._resumable or not isinstance(error, (KeyboardInterrupt, SystemExit, Interruption)):
            self._staging.discard()
            return
        try:
            self._journal.commit(self.position)
        except BaseException:
            self._staging.discard()
            raise
        self._staging.keep()
        if isinstance(error, Interruption):
            raise type(error)(f"{error}; {HOW_TO_RESUME}") from None
        print(f"stopped; {HOW_TO_RESUME}", file=sys.stderr)

    def place(self, task: Task, screened: Screened) -> Sequence[WriterPosition]:
        """Where the chunk's documents go, in the order of the chunks; notes the lines that are none."""
        here = self._placed
        lines_done = here.lines if task.span == here.span else 0
        rejects = [self._record(task, bad, lines_done) for bad in screened.bad_lines]
        rejected = dict(here.rejected)
        for bad in screened.bad_lines:
            rejected[bad.error.kind] = rejected.get(bad.error.kind, 0) + 1
        if self._rejects and rejects:
            with writing(str(self.rejects_path)):
                self._rejects.write(b"".join(rejects))
        self._placed = RunPosition(
            span=task.span, byte=task.chunk.start_byte + task.chunk.size_bytes,
            lines=lines_done + screened.lines,
            sets=tuple(before.after(*counts[:3]) for before, counts in zip(here.sets, screened.counts)),
            text_bytes=tuple(before + counts.text_bytes
                             for before, counts in zip(here.text_bytes, screened.counts)),
            rejects_bytes=here.rejects_bytes + sum(map(len, rejects)), rejected=rejected,
            seconds=self.resumed_at.seconds + time.monotonic() - self._started)
        self._unwritten.append(self._placed)
        return here.sets

    def written(self) -> None:
        """The next chunk is written at its place."""
        # One assignment, so that a signal finds the chunk counted as a whole or not at all.
        self.position = self._unwritten.popleft()
        if self._resumable and time.monotonic() - self._committed >= SECONDS_BETWEEN_COMMITS:
            self._journal.commit(self.position)
            self._committed = time.monotonic()

    def _record(self, task: Task, bad: BadLine, lines_done: int) -> bytes:
        line = 1 + self._lines_before_span(task.span) + lines_done + bad.line
        if not self._rejects:
            path = "standard input" if self._spans[task.span].input.is_standard_input else bad.error.path
            raise UserError(f"{path}, line {line} (byte offset {bad.error.fault_byte}): "
                            f"{bad.error.reason}")
        return as_record(bad, line)

    def _lines_before_span(self, number: int) -> int:
        if number not in self._lines_before:
            span = self._spans[number]
            self._lines_before[number] = (
                count_lines(span.input.path, span.start_byte) if span.start_byte else 0)
        return self._lines_before[number]

    def finish(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Give all files their names; `manifests`, one a key, become the .json files."""
        for writer, manifest, at in zip(self.writers, manifests, self.position.sets):
            writer.position = at
            writer.seal(manifest)
        self._journal.commit(self.position, publishing=True)
        self._staging.publish()
