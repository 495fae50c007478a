"""Rows that only pad the vocabulary: each is the mean of the rows that are there.

In the output layer such a row's logit is the mean logit, and the exponential of a mean is at most the mean of
exponentials (Jensen): so padding can add at most log(padded / rows) to the loss of any token, whatever the
hidden state is. Rows of zeros have no such bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.pretrain.export.elements import ElementType, narrowed, widened
from megatron.pretrain.export.stored import BUFFER_BYTES, OpenFiles, StoredTensor


@dataclass(frozen=True)
class MeanRow:
    """Any number of rows, each the mean of a tensor's, of the tensor's type; a source of `copying`."""

    of: StoredTensor

    @property
    def dtype(self) -> ElementType:
        """The tensor's type."""
        return self.of.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.of.row_bytes

    def read_rows(self, first: int, buffer: memoryview, files: OpenFiles) -> None:
        """Fill `buffer`, bytes of whole rows. Raises UserError as `files` does."""
        buffer[:] = self._row * (len(buffer) // self.row_bytes)

    @cached_property
    def _row(self) -> bytes:
        rows, row_bytes = self.of.shape[0], self.row_bytes
        at_once = max(1, BUFFER_BYTES // row_bytes)
        buffer = memoryview(bytearray(at_once * row_bytes))
        sums = np.zeros(row_bytes // self.dtype.size_bytes)
        with OpenFiles() as files:
            for first in range(0, rows, at_once):
                part = buffer[:min(at_once, rows - first) * row_bytes]
                self.of.read_rows(first, part, files)
                sums += widened(part, self.dtype).reshape(-1, len(sums)).sum(axis=0)
        return narrowed((sums / rows).astype(np.float32), self.dtype).tobytes()
