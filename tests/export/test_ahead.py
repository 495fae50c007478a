"""Reading ahead changes nothing but the time it takes."""

from __future__ import annotations

import threading

import pytest

from megatron.pretrain.export.ahead import one_ahead


def test_items_come_in_order_and_one_is_made_ahead_but_not_two():
    made: list[int] = []
    second_made = threading.Event()

    def source():
        for number in range(5):
            made.append(number)
            if number == 1:
                second_made.set()
            yield number

    items = one_ahead(source())
    assert next(items) == 0
    assert second_made.wait(timeout=10)
    assert made == [0, 1]
    assert list(items) == [1, 2, 3, 4]


def test_what_making_an_item_raises_is_raised_where_it_is_used():
    def source():
        yield 1
        raise ValueError("broken")

    items = one_ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_nothing_is_nothing():
    assert list(one_ahead([])) == []
