"""How far an interrupted run came: JSON lines beside its output, of which the last whole one counts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from megatron.pretrain.data.parts import WriterPosition
from megatron.pretrain.data.staging import StagedFiles, part_name, writing
from megatron.pretrain.errors import UserError

FORMAT = 2


@dataclass(frozen=True)
class RunPosition:
    """What is done: whole chunks of the input, and what they became.

    span, byte: where the next chunk begins; the byte counts from the beginning of the span's file.
    lines: lines of that span that are done.
    sets, text_bytes: one entry a key.
    rejected: lines that were left out, by the kind of what is wrong with them.
    """

    span: int
    byte: int
    lines: int
    sets: tuple[WriterPosition, ...]
    text_bytes: tuple[int, ...]
    rejects_bytes: int
    rejected: Mapping[str, int]
    seconds: float

    @staticmethod
    def start(keys: int) -> RunPosition:
        return RunPosition(0, 0, 0, (WriterPosition(),) * keys, (0,) * keys, 0, {}, 0.0)


@dataclass(frozen=True)
class Interrupted:
    """What an interrupted run left.

    settings: everything its output follows from.
    files: the final names of the files that it was to write.
    position: how far it came.
    publishing: whether it was already giving the files their names.
    journal_bytes: the journal's whole lines.
    """

    settings: Mapping[str, Any]
    files: Sequence[str]
    position: RunPosition
    publishing: bool
    journal_bytes: int


def journal_name(prefix: str) -> str:
    return f"{prefix}.journal"


def read_journal(prefix: str, keys: int) -> Interrupted | None:
    """The interrupted run that was to write under `prefix`; None where there is none."""
    try:
        with open(part_name(journal_name(prefix)), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    # What a power failure cut short does not end with a line's end.
    content = content[:content.rfind(b"\n") + 1]
    header, *records = map(orjson.loads, content.splitlines()) if content else [{}]
    if header.get("format") != FORMAT:
        return None
    position = _position(records[-1]["position"]) if records else RunPosition.start(keys)
    publishing = bool(records) and records[-1]["publishing"]
    return Interrupted(header["settings"], header["files"], position, publishing, len(content))


def _position(record: dict[str, Any]) -> RunPosition:
    sets = tuple(WriterPosition(**each) for each in record["sets"])
    return RunPosition(**{**record, "sets": sets, "text_bytes": tuple(record["text_bytes"])})


class Journal:
    """The journal of the present run, kept until its files are published.

    It goes on with that of the run that is resumed, if there is one.
    """

    def __init__(self, staging: StagedFiles, prefix: str, settings: Mapping[str, Any], files: Sequence[str],
                 resumed: Interrupted | None) -> None:
        self._staging = staging
        self._name = journal_name(prefix)
        self._file = staging.create_scratch(self._name, resumed.journal_bytes if resumed else 0)
        if not resumed:
            self._append({"format": FORMAT, "settings": settings, "files": files})

    def commit(self, position: RunPosition, *, publishing: bool = False) -> None:
        """Record the position, once everything that it counts on would outlive a power failure.

        publishing: from here on, files may have their final names.
        """
        self._staging.sync()
        record = asdict(position)
        record["sets"] = [each._asdict() for each in position.sets]
        self._append({"position": record, "publishing": publishing})
        self._staging.sync()

    def _append(self, record: Mapping[str, Any]) -> None:
        with writing(self._name):
            self._file.write(orjson.dumps(record) + b"\n")
            self._file.flush()


def check_settings(interrupted: Interrupted, settings: Mapping[str, Any], prefix: str) -> None:
    """Raise UserError unless this run would write what the interrupted one was to write."""
    now = orjson.loads(orjson.dumps(settings))
    for name in now:
        if now[name] != interrupted.settings.get(name):
            raise UserError(
                f"--resume: the interrupted run of {os.path.basename(prefix)} had another {name} "
                f"({_difference(interrupted.settings.get(name), now[name])}); give what it was given, or "
                "leave --resume out to start over")


def _difference(before: Any, now: Any) -> str:
    """The first entry that differs, of lists; both values elsewhere."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = next((one, other) for one, other in zip(before, now) if one != other)
    if isinstance(before, dict) and isinstance(now, dict) and before.get("path") == now.get("path"):
        return f"{now['path']} has changed since"
    return f"{_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}..."
