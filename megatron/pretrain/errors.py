"""What a user did wrong, said in one sentence, and how an entry point ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake in what the user gave.

    The message is the one sentence the user reads: it names the file, line or flag, what was wrong
    and what would be right.
    """


class Interruption(UserError):
    """What ended the work came from outside and may be otherwise the next time: what is done is worth keeping."""


def entry(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` and end the process with its exit code.

    A `UserError` becomes `error: ...` on standard error and exit code 2; any other exception is a
    defect of ours and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as mistake:
        sys.stdout.flush()
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code or 0)
