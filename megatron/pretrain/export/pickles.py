"""Pickles of objects whose classes are not loaded: a program of the few steps that make them.

Python's own pickler looks every class up, and so would load torch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """What `module` calls `name`."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What a function makes of arguments."""

    function: Named
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Made:
    """An object of a class, made without arguments and then given its state; it may be a dictionary's key."""

    of_class: Named
    state: Any


@dataclass(frozen=True)
class Persistent:
    """What the reader finds under a number or tuple of its own."""

    key: Any


def pickled(value: Any) -> bytes:
    """A pickle (protocol 2) of None, bools, ints, strings, tuples, lists, dictionaries, and the above."""
    return b"\x80\x02" + _steps(value) + b"."


def _steps(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size_bytes = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size_bytes]) + value.to_bytes(size_bytes, "little", signed=True)
        case str():
            content = value.encode()
            return b"X" + struct.pack("<I", len(content)) + content
        case tuple():
            return b"(" + b"".join(map(_steps, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_steps, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_steps(one) for item in value.items() for one in item) + b"u"
        case Named(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return _steps(function) + _steps(arguments) + b"R"
        case Made(of_class, state):
            return _steps(of_class) + b")\x81" + _steps(state) + b"b"
        case Persistent(key):
            return _steps(key) + b"Q"
    raise TypeError(f"{type(value).__name__} is not pickled here")
