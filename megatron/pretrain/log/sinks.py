"""Where figures go: the console, a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import orjson

from megatron.pretrain.errors import UserError
from megatron.pretrain.log.metrics import IntervalRecord, clock, megatron_line

METRICS_FILE = "metrics.jsonl"
_INSTALL = 'pip install "neo-pretrain[log]"'


class Sink(Protocol):
    """One place that figures go to. Only one rank of a run has sinks."""

    def log(self, record: IntervalRecord) -> None:
        """Take the figures of an interval."""

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Take something that happened, such as ("validation", {"iteration": 100, "lm_loss": 2.5}).

        `values` has an "iteration", and plain numbers and strings.
        """

    def close(self) -> None:
        """Write what is held back. Nothing may come after."""


class Console:
    """One line for each record and event."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def log(self, record: IntervalRecord) -> None:
        print(megatron_line(record), file=self._stream, flush=True)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        pieces = [f"{key.replace('_', ' ')}: {_short(value)}" for key, value in values.items()]
        print(f" [{clock(time.time())}] " + " | ".join([name, *pieces]) + " |", file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class JsonLines:
    """Appends to PATH: a record is an object of its fields, an event one with an "event" beside its values.

    A run that resumes goes on in the same file. What an earlier attempt wrote after the checkpoint stays
    there, and `read_metrics` leaves it out. A figure that is not finite is null, as JSON has no NaN.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered and a line a write: what was logged is there after a crash.
            self._file = open(self.path, "a+b", buffering=0)
            self._cut_torn_line()
        except OSError as error:
            raise UserError(f"--log-dir: cannot write {self.path}: {error.strerror}") from None

    def _cut_torn_line(self) -> None:
        """Drop a last line that a killed run did not finish; the next would continue it."""
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def log(self, record: IntervalRecord) -> None:
        self._write(record.as_dict())

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        self._write({"event": name, **values, "time_s": time.time()})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in order of iteration, without events.

    Where a run was resumed, a record replaces those that were written earlier for its iteration and for
    later ones: they belong to an attempt that was given up.
    """
    records: list[dict[str, Any]] = []
    for line in Path(path).read_bytes().splitlines():
        values = orjson.loads(line)
        if "event" in values:
            continue
        while records and records[-1]["iteration"] >= values["iteration"]:
            records.pop()
        records.append(values)
    return records


class TensorBoard:
    """Scalars under "train/", or under an event's name, over iterations.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(f"--tensorboard-dir {folder}: tensorboard is not installed; {_INSTALL}") from None
        self._writer = SummaryWriter(str(folder))

    def log(self, record: IntervalRecord) -> None:
        self.event("train", record.as_dict())

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        for key, value in _figures(values).items():
            self._writer.add_scalar(f"{name}/{key}", value, values["iteration"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Figures under "train/", or under an event's name, over iterations.

    Args:
        project: --wandb-project.
        name: --wandb-exp-name; Weights & Biases chooses one for None.
        folder: --wandb-save-dir; the working directory for None.
        config: the run's configuration, shown beside its figures.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, project: str, name: str | None = None, folder: str | None = None,
                 config: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(f"--wandb-project {project}: wandb is not installed; {_INSTALL}") from None
        self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config or {}))

    def log(self, record: IntervalRecord) -> None:
        self.event("train", record.as_dict())

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        figures = {f"{name}/{key}": value for key, value in _figures(values).items()}
        self._run.log(figures, step=values["iteration"])

    def close(self) -> None:
        self._run.finish()


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn over iterations."""
    drawn_over = ("iteration", "train_iters", "time_s")
    return {key: value for key, value in values.items()
            if isinstance(value, (int, float)) and key not in drawn_over}


def _short(value: Any) -> str:
    return f"{value:.6E}" if isinstance(value, float) else str(value)
