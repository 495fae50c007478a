"""A setting of a run: a dataclass field that is also a flag."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, help: str, *, aliases: tuple[str, ...] = (), choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field that is also a flag: its default, its help, other spellings, allowed values."""
    return dataclasses.field(
        default=default, metadata={"help": help, "aliases": aliases, "choices": choices})
