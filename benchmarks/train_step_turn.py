"""One measurement of benchmarks/train_step.py from outside: a process, or one a GPU, that waits for its turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHILD = HERE / "train_step_arm.py"
SECONDS_TO_END = 40.0
"""torchrun gives its workers 30."""


class Turn:
    """A measurement whose processes have been started. They import, and wait for `take` before they touch a GPU."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._place, self._log, self._processes = Path(self._folder.name), log, spec["tp"] * spec["dp"]
        self._stopped: str | None = None
        spec = {**spec, "started": time.time(), "parent": os.getpid(), "folder": self._folder.name}
        with open(log, "wb") as words:
            self._process = subprocess.Popen(_command(spec), env=_environment(), stdout=words,
                                             stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_ready(self, until_s: float) -> None:
        """Until all its processes have imported, or one has ended; it is ended at that time of `time.monotonic`."""
        while self._process.poll() is None and len(list(self._place.glob("ready-*"))) < self._processes:
            if time.monotonic() > until_s:
                self._stopped = "stopped while it imported (--timeout)"
                self._end()
            time.sleep(0.02)

    def take(self, timeout_s: float) -> dict[str, Any]:
        """Let it measure. Returns what it found, failures among it."""
        begin = time.perf_counter()
        (self._place / "go").touch()
        ended = self._stopped or self._wait(timeout_s)
        run: dict[str, Any] = {"failed": {}}
        result = self._place / "result.json"
        if result.exists():
            run |= json.loads(result.read_text(encoding="utf-8"))
        run["seconds"] = time.perf_counter() - begin
        if ended is not None and not run["failed"] and "left_out" not in run:
            run["failed"]["process"] = {"reason": f"{ended}; {_last_line(self._log)}", "traceback": _tail(self._log)}
        self.close()
        return run

    def close(self) -> None:
        """End it, if it has not ended, and forget its files."""
        if self._process.poll() is None:
            self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        """torchrun's workers are in sessions of their own: torchrun must end them, or they keep their GPUs."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _wait(self, timeout_s: float) -> str | None:
        """How it ended, if not well."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout_s:.0f} s (--timeout)"
        return None if code == 0 else f"exit code {code}"


def _command(spec: dict[str, Any]) -> list[str]:
    processes = spec["tp"] * spec["dp"]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                          str(processes)]
    return [sys.executable, *launcher, str(CHILD), json.dumps(spec)]


def _environment() -> dict[str, str]:
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        # As the launchers set them; NVLink multicast is not needed, and not every machine allows it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "NCCL_NVLS_ENABLE": "0",
        **{name: value for name, value in os.environ.items() if name not in own},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing was said"
