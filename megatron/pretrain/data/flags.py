"""The command line of a data tool: argparse whose mistakes are single sentences."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron.pretrain.errors import UserError


class FlagParser(argparse.ArgumentParser):
    """argparse where '_' and '-' are one in a flag, and a mistake raises UserError.

    `refused` are flags of the original that we do not have, each with what to do instead.
    """

    def __init__(self, *, refused: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._refused = dict(refused or {})

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read the flags. An unknown one is named before a missing one: it is often its misspelling."""
        words = [_with_dashes(word) for word in argv]
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if flag in self._refused:
                raise UserError(f"{flag}: not supported here; {self._refused[flag]}")
            if flag not in self._option_string_actions:
                raise UserError(self._about_unknown(flag))
        return self.parse_args(words)

    def _about_unknown(self, flag: str) -> str:
        import difflib  # a mistake can wait for it, a run need not

        nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"unknown flag {flag}; " + (f"the nearest known one is {nearest[0]}" if nearest
                                           else "--help lists the known ones")

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def positive_number(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
