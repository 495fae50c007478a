"""PREFIX_rejects.jsonl: the lines that were left out, with all that is needed to mend them."""

from __future__ import annotations

import base64
from typing import Any

import orjson

from megatron.pretrain.data.documents import BadLine


def as_record(bad: BadLine, line: int) -> bytes:
    """A line of the rejects file: file, line (from 1), byte_offset (of the fault), kind, reason, the line.

    The line itself is under "text"; where it is not UTF-8, under "base64".
    """
    error = bad.error
    record: dict[str, Any] = {"file": error.path, "line": line, "byte_offset": error.fault_byte,
                              "kind": error.kind, "reason": error.reason}
    try:
        record["text"] = bad.raw.decode("utf-8")
    except UnicodeDecodeError:
        record["base64"] = base64.b64encode(bad.raw).decode()
    return orjson.dumps(record) + b"\n"
