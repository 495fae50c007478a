"""Files written under hidden names beside their final ones, which then appear together or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from megatron.pretrain.errors import UserError


def part_name(final: str) -> str:
    """Where the file that will be `final` is until it is whole."""
    folder, name = os.path.split(final)
    return os.path.join(folder, f".{name}.part")


def reclaim(final: str) -> None:
    """Take back a file that a publication had renamed before it was cut short."""
    if os.path.exists(final) and not os.path.exists(part_name(final)):
        with writing(final):
            os.replace(final, part_name(final))


class StagedFiles:
    """The files of one piece of work.

    Every file that is open is locked, so that two runs that write the same set do not write into one
    file. `publish`, `discard` or `keep` ends the work.
    """

    def __init__(self) -> None:
        self._finals: list[str] = []
        self._scratch: list[str] = []
        self._open: dict[str, BinaryIO] = {}
        self._published: list[str] = []
        self.is_published = False

    def create(self, final: str, kept_bytes: int = 0) -> BinaryIO:
        """Open the file that will be `final`; it begins with `kept_bytes` bytes that an interrupted run left.

        Raises UserError where it cannot be written, is another run's, or is shorter than `kept_bytes`.
        """
        file = self._open_part(final, kept_bytes)
        self._finals.append(final)
        return file

    def create_scratch(self, name: str, kept_bytes: int = 0) -> BinaryIO:
        """The same for a file that is needed only until the others are published."""
        file = self._open_part(name, kept_bytes)
        self._scratch.append(name)
        return file

    def write(self, final: str, parts: Iterable[bytes | memoryview]) -> None:
        """Make the file that will be `final` out of `parts`."""
        file = self.create(final)
        with writing(final):
            for part in parts:
                file.write(part)

    def sync(self) -> None:
        """Return when everything written so far would outlive a power failure."""
        for final, file in self._open.items():
            with writing(final):
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename. An older set of the name goes first, so that no moment mixes its files with the new."""
        self.sync()
        with _signals_held():
            for final in reversed(self._finals):
                with writing(final), contextlib.suppress(FileNotFoundError):
                    os.remove(final)
            for final in self._finals:
                with writing(final):
                    self._published.append(final)
                    os.replace(part_name(final), final)
            self.is_published = True
            self.keep()
            _remove(map(part_name, self._scratch))

    def discard(self) -> None:
        """Remove whatever is there."""
        self.keep()
        _remove([*map(part_name, [*self._finals, *self._scratch]), *self._published])

    def keep(self) -> None:
        """Close the files and leave them for a run that goes on with them."""
        for file in self._open.values():
            with contextlib.suppress(OSError):  # a full disk fails again on close, and was reported before
                file.close()
        self._open.clear()

    def _open_part(self, final: str, kept_bytes: int) -> BinaryIO:
        with writing(final):
            file = open(os.open(part_name(final), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._open[final] = file
        _lock(file, final)
        if os.fstat(file.fileno()).st_size < kept_bytes:
            raise UserError(f"--resume: {part_name(final)} is shorter than the interrupted run left it; "
                            "leave --resume out to start over")
        with writing(final):
            file.truncate(kept_bytes)
            file.seek(kept_bytes)
        return file


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let the signals that end a program wait for a moment's work that must not be cut in two."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lock(file: BinaryIO, final: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{final}: another run is writing it; wait, or choose another prefix") from None
    except OSError:
        # A file system without locks (Lustre mounted without them): then nothing guards against two runs.
        return


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Say of an output that cannot be written what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
