"""Reading while writing: the next item is made in a thread while this one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END: object = object()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, each made while the one before it is used; what making one raises is raised here."""
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, source, _END)
            yield item    # type: ignore[misc]
            del item
